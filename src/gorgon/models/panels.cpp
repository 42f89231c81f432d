// Products of a few rows with a large weight, as fast as the weight can be read.
//
// BLAS is made for large products: from two rows on, a product of a draft tree's rows takes far longer than reading the
// weight does. Here the weight lies in panels of WIDTH outputs, [inputs][WIDTH], so that it is read once, in order, while
// up to ROWS rows are multiplied from registers. More rows go over chunks of a panel that stay in the first-level cache.
// The panels are those of the usual inner kernel of a matrix product (Goto and van de Geijn, 2008, section 5).
//
// Invariant: every output is one sum over the inputs in their order, whatever number of rows there are. So the product of
// a row is the same, to the last bit, in a step that verifies a draft tree as in a plain one.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "kernels.h"

namespace {

// Registers of a panel's width, and rows whose sums fit into the registers that are left.
constexpr int ACROSS = LANES == 4 ? 4 : 2, ROWS = REGISTERS == 32 ? 28 / ACROSS : 12 / ACROSS;
constexpr int WIDTH = LANES * ACROSS;
// Inputs of a chunk: 32 KB of a panel at most, which the first-level cache holds beside the rows' own.
constexpr int64_t CHUNK = 256;
// Rows that go over a panel before the next one is read: they must stay in the second-level cache.
constexpr int64_t BLOCK = 64;
// How far ahead the only pass over a weight asks for it: memory takes some 100 ns to answer.
constexpr int64_t AHEAD = 8192;
constexpr int LINE = 64;

// A weight is float32, or bfloat16: the upper half of one, read in half the time. Halves lie in pairs, so that a vector
// of words holds two vectors of weights, and taking them apart is one instruction each.
typedef uint16_t Half;
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(alignof(Half))));

inline void read_weights(const float* at, Vector (&weights)[ACROSS]) {
  for (int v = 0; v < ACROSS; ++v) weights[v] = vector_at(at + v * LANES);
}
inline void read_weights(const Half* at, Vector (&weights)[ACROSS]) {
  for (int v = 0; v < ACROSS; v += 2) {
    const Words words = *reinterpret_cast<const Words*>(at + v * LANES);
    weights[v] = reinterpret_cast<Vector>(words & 0xFFFF0000u);
    weights[v + 1] = reinterpret_cast<Vector>(words << 16);
  }
}

template <typename Weight>
struct Product {
  const float* x;        // [rows, inputs]
  const Weight* panels;  // [ceil(outputs / WIDTH), inputs, WIDTH]
  const float* bias;     // [outputs] or null
  float* y;              // [rows, outputs]
  int64_t rows, inputs, outputs;
};

// What the sums of one panel begin with: the outputs' biases, or what an earlier chunk has left in y.
struct Start {
  Vector bias[ACROSS];
  bool from_y;
};

// The memory that the next chunk is in, and how much of it each input asks for.
struct Ahead {
  const char* at;
  int64_t step;
};

// Adds the products of `inputs` inputs to the sums of R rows with one panel.
template <int R, int LINES, typename Weight>
inline __attribute__((always_inline)) void accumulate(
    const float* __restrict x, int64_t x_stride, const Weight* __restrict panel, float* __restrict y, int64_t y_stride,
    int64_t inputs, const Start& start, Ahead ahead) {
  Vector sums[R][ACROSS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < ACROSS; ++v)
      sums[r][v] = start.from_y ? vector_at(y + r * y_stride + v * LANES) : start.bias[v];
  for (int64_t k = 0; k < inputs; ++k) {
    Vector weight[ACROSS];
    read_weights(panel + k * WIDTH, weight);
    for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead.at + k * ahead.step + line * LINE, 0, 2);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < ACROSS; ++v) sums[r][v] += x[r * x_stride + k] * weight[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < ACROSS; ++v) vector_at(y + r * y_stride + v * LANES) = sums[r][v];
}

// The same for a number of rows that is known only now.
template <int LINES, typename Weight, int R = ROWS>
inline void accumulate_rows(
    int64_t rows, const float* x, int64_t x_stride, const Weight* panel, float* y, int64_t y_stride, int64_t inputs,
    const Start& start, Ahead ahead) {
  if (rows == R)
    accumulate<R, LINES>(x, x_stride, panel, y, y_stride, inputs, start, ahead);
  else if constexpr (R > 1)
    accumulate_rows<LINES, Weight, R - 1>(rows, x, x_stride, panel, y, y_stride, inputs, start, ahead);
}

// One panel times the rows from `first` to `last`; y has room for WIDTH outputs of each row.
template <typename Weight>
void multiply(const Product<Weight>& p, int64_t panel, int64_t first, int64_t last, float* y, int64_t y_stride) {
  constexpr int64_t BYTES = WIDTH * sizeof(Weight);  // of a panel's weights for one input
  Start start{};
  const int64_t known = std::min<int64_t>(WIDTH, p.outputs - panel * WIDTH);
  if (p.bias) std::memcpy(start.bias, p.bias + panel * WIDTH, sizeof(float) * known);
  const Weight* const weight = p.panels + panel * p.inputs * WIDTH;
  const int64_t passes = (last - first + ROWS - 1) / ROWS;
  if (passes == 1) {
    const Ahead ahead{reinterpret_cast<const char*>(weight) + AHEAD, BYTES};
    accumulate_rows<std::max<int>(BYTES / LINE, 1)>(
        last - first, p.x + first * p.inputs, p.inputs, weight, y, y_stride, p.inputs, start, ahead);
    return;
  }
  const int64_t height = (last - first + passes - 1) / passes;
  for (int64_t from = 0; from < p.inputs; from += CHUNK) {
    const int64_t inputs = std::min(CHUNK, p.inputs - from);
    Ahead ahead{reinterpret_cast<const char*>(weight + (from + inputs) * WIDTH), BYTES / passes};
    for (int64_t row = first; row < last; row += height) {
      accumulate_rows<1>(
          std::min(height, last - row), p.x + row * p.inputs + from, p.inputs, weight + from * WIDTH,
          y + (row - first) * y_stride, y_stride, inputs, start, ahead);
      ahead.at += inputs * ahead.step;
    }
    start.from_y = true;
  }
}

// The panels from `begin` to `end`, which are one thread's.
template <typename Weight>
void multiply_panels(const Product<Weight>& p, int64_t begin, int64_t end) {
  float edge[BLOCK * WIDTH];  // of a last panel that is wider than what is left of the outputs
  for (int64_t first = 0; first < p.rows; first += BLOCK) {
    const int64_t last = std::min(first + BLOCK, p.rows);
    for (int64_t panel = begin; panel < end; ++panel) {
      float* const y = p.y + first * p.outputs + panel * WIDTH;
      const int64_t left = p.outputs - panel * WIDTH;
      if (left >= WIDTH) {
        multiply(p, panel, first, last, y, p.outputs);
        continue;
      }
      multiply(p, panel, first, last, edge, WIDTH);
      for (int64_t row = 0; row < last - first; ++row)
        std::memcpy(y + row * p.outputs, edge + row * WIDTH, sizeof(float) * left);
    }
  }
}

// How many panels hold so many outputs.
int64_t panels_for(int64_t outputs) { return (outputs + WIDTH - 1) / WIDTH; }

// Products of `count` weights, each with rows of its own; `first` is the first of them.
template <typename Weight>
void multiply_all(const Product<Weight>& first, int64_t count) {
  const int64_t panels = panels_for(first.outputs);
  torch::stable::parallel_for(0, count * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin / panels; k * panels < end; ++k) {
      Product<Weight> p = first;
      p.x += k * p.rows * p.inputs, p.y += k * p.rows * p.outputs, p.panels += k * panels * p.inputs * WIDTH;
      if (p.bias) p.bias += k * p.outputs;
      multiply_panels(p, std::max<int64_t>(begin - k * panels, 0), std::min(end - k * panels, panels));
    }
  });
}

// [..., outputs, inputs] to [..., ceil(outputs / WIDTH), inputs, WIDTH], filled up with zeros.
Tensor pack_panels(const Tensor& weight) {
  const int64_t last = weight.dim() - 1;
  STD_TORCH_CHECK(
      1 <= last && last + 1 < MOST_DIMS && is_plain(weight), "weight: contiguous float32 matrices on the CPU");
  const int64_t outputs = weight.size(last - 1), inputs = weight.size(last), panels = panels_for(outputs);
  STD_TORCH_CHECK(outputs > 0 && inputs > 0, "weight: not empty");
  int64_t sizes[MOST_DIMS];
  for (int64_t d = 0; d < last - 1; ++d) sizes[d] = weight.size(d);
  sizes[last - 1] = panels, sizes[last] = inputs, sizes[last + 1] = WIDTH;
  const Tensor packed = empty(sizes, last + 2);
  const float* const from = data_of(weight);
  float* const to = data_of(packed);
  torch::stable::parallel_for(0, weight.numel() / (outputs * inputs) * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      for (int64_t k = 0; k < inputs; ++k)
        for (int64_t lane = 0; lane < WIDTH; ++lane) {
          const int64_t output = unit % panels * WIDTH + lane;
          const float* const matrix = from + unit / panels * outputs * inputs;
          to[(unit * inputs + k) * WIDTH + lane] = output < outputs ? matrix[output * inputs + k] : 0.0f;
        }
  });
  return packed;
}

// Panels in bfloat16 with their halves in pairs: of every two vectors the second one's half, then the first one's.
Tensor pair_halves(const Tensor& panels) {
  const bool fits = panels.dim() == 4 && panels.size(3) == WIDTH && is_half(panels);
  STD_TORCH_CHECK(fits, "panels: as pack_panels makes them, in bfloat16");
  const Tensor paired = torch::stable::empty_like(panels);
  const Half* const from = static_cast<const Half*>(panels.data_ptr());
  Half* const to = static_cast<Half*>(paired.data_ptr());
  for (int64_t at = 0; at < panels.numel(); at += 2 * LANES)
    for (int lane = 0; lane < LANES; ++lane)
      to[at + 2 * lane] = from[at + LANES + lane], to[at + 2 * lane + 1] = from[at + lane];
  return paired;
}

// [..., inputs] to [..., outputs], by the weight whose panels begin at `offset` in a block.
Tensor panel_linear(
    const Tensor& given, const Tensor& block, int64_t offset, int64_t inputs, const std::optional<Tensor>& bias,
    int64_t outputs) {
  const Tensor x = in_order(given);
  const int64_t last = x.dim() - 1, size = panels_for(outputs) * WIDTH * inputs;
  STD_TORCH_CHECK(0 <= last && last < MOST_DIMS && is_plain(x), "x: float32, of one to eight dimensions");
  STD_TORCH_CHECK(x.size(last) == inputs, "x: as many inputs as the weight has");
  STD_TORCH_CHECK(
      is_plain(block) && 0 <= offset && 0 < size && offset + size <= block.numel(), "block: holds the weight's panels");
  STD_TORCH_CHECK(!bias || (bias->numel() == outputs && is_plain(*bias)), "bias: float32, one for each output");
  int64_t sizes[MOST_DIMS];
  for (int64_t d = 0; d <= last; ++d) sizes[d] = d == last ? outputs : x.size(d);
  const Tensor y = empty(sizes, last + 1);
  const float* const added = bias ? data_of(*bias) : nullptr;
  multiply_all<float>({data_of(x), data_of(block) + offset, added, data_of(y), x.numel() / inputs, inputs, outputs}, 1);
  return y;
}

// Rows [K, rows, inputs], panels of K weights, float32 or paired halves, and biases [K, outputs] to [K, rows, outputs].
Tensor panel_products(const Tensor& given, const Tensor& panels, const Tensor& bias) {
  const Tensor x = in_order(given);
  STD_TORCH_CHECK(
      panels.dim() == 4 && panels.size(3) == WIDTH && (is_plain(panels) || is_half(panels)),
      "panels: as pack_panels or pair_halves makes them");
  const int64_t count = panels.size(0), inputs = panels.size(2);
  STD_TORCH_CHECK(bias.dim() == 2 && bias.size(0) == count && is_plain(bias), "bias: float32, one row for each weight");
  const int64_t outputs = bias.size(1);
  STD_TORCH_CHECK(panels.size(1) == panels_for(outputs), "bias: as many as the packed weights have outputs");
  STD_TORCH_CHECK(
      x.dim() == 3 && x.size(0) == count && x.size(2) == inputs && is_plain(x), "x: float32, rows for each weight");
  const int64_t rows = x.size(1), sizes[] = {count, rows, outputs};
  const Tensor y = empty(sizes, 3);
  if (is_half(panels))
    multiply_all<Half>(
        {data_of(x), static_cast<const Half*>(panels.data_ptr()), data_of(bias), data_of(y), rows, inputs, outputs},
        count);
  else
    multiply_all<float>({data_of(x), data_of(panels), data_of(bias), data_of(y), rows, inputs, outputs}, count);
  return y;
}

}  // namespace

// The doors for code that torch generates: without looking the operations up by their names at every call.
extern "C" AOTITorchError aoti_torch_cpu_panel_linear(
    AtenTensorHandle x, AtenTensorHandle block, int64_t offset, int64_t inputs, AtenTensorHandle* bias,
    int64_t outputs, AtenTensorHandle* result) {
  return through_door(result, [&] {
    const std::optional<Tensor> added = bias ? std::optional(borrowed(*bias)) : std::nullopt;
    return panel_linear(borrowed(x), borrowed(block), offset, inputs, added, outputs);
  });
}

extern "C" AOTITorchError aoti_torch_cpu_panel_products(
    AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle bias, AtenTensorHandle* result) {
  return through_door(result, [&] { return panel_products(borrowed(x), borrowed(panels), borrowed(bias)); });
}

int64_t panel_width() { return WIDTH; }

STABLE_TORCH_LIBRARY_FRAGMENT(gorgon, library) {
  library.def("panel_width() -> int");
  library.def("pack_panels(Tensor weight) -> Tensor");
  library.def("pair_halves(Tensor panels) -> Tensor");
  library.def("panel_linear(Tensor x, Tensor block, int offset, int inputs, Tensor? bias, int outputs) -> Tensor");
  library.def("panel_products(Tensor x, Tensor panels, Tensor bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gorgon, CompositeExplicitAutograd, library) {
  library.impl("panel_width", TORCH_BOX(&panel_width));
}

STABLE_TORCH_LIBRARY_IMPL(gorgon, CPU, library) {
  library.impl("pack_panels", TORCH_BOX(&pack_panels));
  library.impl("pair_halves", TORCH_BOX(&pair_halves));
  library.impl("panel_linear", TORCH_BOX(&panel_linear));
  library.impl("panel_products", TORCH_BOX(&panel_products));
}
