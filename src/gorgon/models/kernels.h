// What our kernels share: the processor's vectors, and tensors as torch's stable interface gives them.
#pragma once

#include <cstdint>
#include <exception>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

// Lanes of a vector register; they may lie anywhere in memory.
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(alignof(int32_t))));

inline const Vector& vector_at(const float* at) { return *reinterpret_cast<const Vector*>(at); }
inline Vector& vector_at(float* at) { return *reinterpret_cast<Vector*>(at); }

inline bool is_float(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Float;
}

inline bool is_plain(const Tensor& tensor) { return is_float(tensor) && tensor.is_contiguous(); }

// Bfloat16, in order, on the CPU.
inline bool is_half(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16 && tensor.is_contiguous();
}

inline float* data_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// The tensor itself, or a copy whose numbers lie in order.
inline Tensor in_order(const Tensor& given) { return given.is_contiguous() ? given : torch::stable::contiguous(given); }

constexpr int64_t MOST_DIMS = 8;

// A new tensor on the CPU, in order, without values; at most MOST_DIMS dimensions.
inline Tensor empty(const int64_t* sizes, int64_t dims, int32_t dtype = aoti_torch_dtype_float32()) {
  int64_t strides[MOST_DIMS], stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A tensor that belongs to the caller.
inline Tensor borrowed(AtenTensorHandle handle) {
  AtenTensorHandle own;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &own));
  return Tensor(own);
}

// For the doors through which generated code calls: what `make` returns, or that it has failed.
template <typename Make>
AOTITorchError through_door(AtenTensorHandle* result, const Make& make) {
  try {
    return aoti_torch_new_tensor_handle(make().get(), result);
  } catch (const std::exception&) {
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace
