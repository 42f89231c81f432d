// The largest of a row's numbers: the token that a model's logits choose.
//
// Code that torch generates for it looks at one number after another, which with eight nodes takes longer than a layer's
// attention does.
//
// Invariant: torch's own result: the first of equals, and the first that is no number where there is one.
#include <algorithm>
#include <limits>

#include "kernels.h"

namespace {

// Numbers that one thread looks at at least.
constexpr int64_t GRAIN = 1 << 15;

int64_t first_of_largest(const float* x, int64_t size) {
  int64_t best = 0, at = 0;
  bool numbers = true;
  if (size >= LANES) {
    Integers place, here, odd = {};
    for (int lane = 0; lane < LANES; ++lane) here[lane] = lane;
    place = here;
    Vector most = vector_at(x);
    for (; at + LANES <= size; at += LANES, here += LANES) {
      const Vector given = vector_at(x + at);
      const Integers more = given > most;
      most = more ? given : most;
      place = more ? here : place;
      odd |= given != given;
    }
    best = place[0];
    for (int lane = 0; lane < LANES; ++lane) {
      numbers &= !odd[lane];
      if (most[lane] > x[best] || (most[lane] == x[best] && place[lane] < best)) best = place[lane];
    }
  }
  for (; at < size; ++at) {
    numbers &= x[at] == x[at];
    if (x[at] > x[best]) best = at;
  }
  return numbers ? best : std::find_if(x, x + size, [](float number) { return number != number; }) - x;
}

// [..., size] to int64 [...].
Tensor first_max(const Tensor& given) {
  const Tensor x = in_order(given);
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(0 <= last && last < MOST_DIMS && is_plain(x), "x: float32, of one to eight dimensions");
  const int64_t size = x.size(last);
  STD_TORCH_CHECK(0 < size && size <= std::numeric_limits<int32_t>::max(), "x: rows of at least one number");
  int64_t sizes[MOST_DIMS];
  for (int64_t d = 0; d < last; ++d) sizes[d] = x.size(d);
  const Tensor result = empty(sizes, last, aoti_torch_dtype_int64());
  const float* const from = data_of(x);
  int64_t* const to = static_cast<int64_t*>(result.data_ptr());
  torch::stable::parallel_for(0, x.numel() / size, std::max<int64_t>(1, GRAIN / size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) to[row] = first_of_largest(from + row * size, size);
  });
  return result;
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_first_max(AtenTensorHandle x, AtenTensorHandle* result) {
  return through_door(result, [&] { return first_max(borrowed(x)); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(gorgon, library) { library.def("first_max(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(gorgon, CPU, library) { library.impl("first_max", TORCH_BOX(&first_max)); }
