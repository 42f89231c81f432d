// Attention of a draft tree's nodes, or of a prompt's tokens, over the rows of the key-value cache.
//
// Medusa's tree attention (arXiv:2401.10774, section 2.1.2) is usually a mask over all rows. But what a node sees is
// simple: a span of the context, then its own ancestors. Here that is what a query is given, so no mask is made, no
// score is computed to be thrown away but those of siblings, and grouped queries read their keys and values once.
//
// Invariant: a query's result is a function of the rows that it sees, in their order, alone: sums over rows run along
// that list, wherever the rows lie and whichever queries are computed beside it. So a node gets the same bits in a draft
// tree as in plain decoding.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

// Vectors of a value's width, and queries whose sums over them fit into the registers that are left.
constexpr int WIDE = 4, QUERIES = REGISTERS == 32 ? 6 : 2;
constexpr int64_t FIELDS = 3;

// Rows [first, end) of the context, and of the rows from `end` on those whose bits are set.
struct Span {
  int64_t first, end;
  uint64_t bits;
  int64_t last() const { return end + (bits ? 64 - __builtin_clzll(bits) : 0); }
};
static_assert(sizeof(Span) == FIELDS * sizeof(int64_t));

// A matrix of rows whose numbers lie side by side, for every sequence and head.
struct Rows {
  const float* data;
  int64_t sequence, head, row;  // strides
  const float* of(int64_t b, int64_t h) const { return data + b * sequence + h * head; }
};

struct Attention {
  Rows queries, keys, values;
  const Span* spans;  // [batch, nodes]
  float* result;      // [batch, nodes, heads, value_size]
  int64_t batch, nodes, heads, groups, size, value_size;
  float scale;
};

// Queries of one sequence and group that are computed together: from `begin` to `end` of the nodes at place b times the
// heads that share keys. `sequence` is whose rows they see, which their spans count from `base` on.
struct Block {
  int64_t b, group, begin, end, sequence, base;
};

template <int... I>
inline Vector half_of(const Vector& a, const Vector& b, int odd, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return odd ? __builtin_shufflevector(a, b, (2 * I + 1)...) : __builtin_shufflevector(a, b, (2 * I)...);
#else
  return odd ? __builtin_shuffle(a, b, Integers{(2 * I + 1)...}) : __builtin_shuffle(a, b, Integers{(2 * I)...});
#endif
}

// Sums of neighbouring lanes: those of a, then those of b.
inline Vector pairs(const Vector& a, const Vector& b) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  return half_of(a, b, 0, lanes) + half_of(a, b, 1, lanes);
}

// Products of a query with LANES rows of keys from `keys` on, of which `rows` are there; the others' mean nothing.
inline Vector scores_of(const float* query, const float* keys, int64_t stride, int64_t rows, int64_t size) {
  const float* row[LANES];
  Vector sums[LANES] = {};
  for (int i = 0; i < LANES; ++i) row[i] = keys + std::min<int64_t>(i, rows - 1) * stride;
  for (int64_t d = 0; d < size; d += LANES) {
    const Vector x = vector_at(query + d);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) sums[i] += x * vector_at(row[i] + d);
  }
#pragma GCC unroll 4
  for (int left = LANES / 2; left; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) sums[i] = pairs(sums[2 * i], sums[2 * i + 1]);
  return sums[0];
}

// e^x for x <= 0, to a few units in the last place: 2^n times a polynomial of what is left (Cephes' expf).
inline Vector exponential(Vector x) {
  constexpr float LEAST = -87.0f, TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  x = x < LEAST ? Vector{} + LEAST : x;
  const Vector shifted = x * 1.44269504088896341f + TO_INTEGER;
  const Vector n = shifted - TO_INTEGER;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers power = ((Integers)shifted << 23) + 0x3f800000;
  return p * (Vector)power;
}

// Turns the scores of the rows that a query sees into weights, as a list: the context's, then the ancestors'.
// Returns the sum of the weights. Behind the scores there must be room for LANES more.
float weigh(float* scores, const Span& span) {
  constexpr float NEVER = -std::numeric_limits<float>::infinity();
  int64_t count = span.end - span.first;
  const float* const tree = scores + count;
  for (uint64_t bits = span.bits; bits; bits &= bits - 1) scores[count++] = tree[__builtin_ctzll(bits)];
  vector_at(scores + count) = Vector{} + NEVER;
  Vector most = Vector{} + NEVER, sums = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Vector here = vector_at(scores + i);
    most = here > most ? here : most;
  }
  float top = NEVER, sum = 0;
  for (int lane = 0; lane < LANES; ++lane) top = std::max(top, most[lane]);
  for (int64_t i = 0; i < count; i += LANES) {  // the lanes behind the list are too small to change a bit of the sum
    vector_at(scores + i) = exponential(vector_at(scores + i) - top);
    sums += vector_at(scores + i);
  }
  for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
  return sum;
}

// Adds `rows` rows of values to the sums [R, size] of R queries, weighted by [R, rows].
template <int R, int V>
inline __attribute__((always_inline)) void add_columns(
    const float* weights, int64_t weights_row, const float* values, int64_t values_row, int64_t rows, int64_t size,
    float* sums) {
  Vector held[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) held[r][v] = vector_at(sums + r * size + v * LANES);
  for (int64_t row = 0; row < rows; ++row)
    for (int v = 0; v < V; ++v) {
      const Vector value = vector_at(values + row * values_row + v * LANES);
      for (int r = 0; r < R; ++r) held[r][v] += weights[r * weights_row + row] * value;
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) vector_at(sums + r * size + v * LANES) = held[r][v];
}

template <int R = QUERIES>
void add_rows(
    int64_t queries, const float* weights, int64_t weights_row, const float* values, int64_t values_row, int64_t rows,
    int64_t size, float* sums) {
  if constexpr (R > 1)
    if (queries < R) return add_rows<R - 1>(queries, weights, weights_row, values, values_row, rows, size, sums);
  int64_t d = 0;
  for (; d + WIDE * LANES <= size; d += WIDE * LANES)
    add_columns<R, WIDE>(weights, weights_row, values + d, values_row, rows, size, sums + d);
  for (; d < size; d += LANES) add_columns<R, 1>(weights, weights_row, values + d, values_row, rows, size, sums + d);
}

// The queries of a block, at most QUERIES; `room` is memory to work in.
void attend(const Attention& a, const Block& block, std::vector<float>& room) {
  const int64_t b = block.b, group = block.group, begin = block.begin, count = block.end - begin;
  const int64_t shared = a.heads / a.groups;
  Span spans[QUERIES];
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0, same_from = 0, same_to = first;
  for (int64_t q = 0; q < count; ++q) {
    Span& span = spans[q] = a.spans[b * a.nodes + (begin + q) / shared];
    span.first -= block.base, span.end -= block.base;
    first = std::min(first, span.first), last = std::max(last, span.last());
    same_from = std::max(same_from, span.first), same_to = std::min(same_to, span.end);
  }
  same_to = std::max(same_from, same_to);
  const int64_t width = last - first + 2 * LANES;
  room.resize(count * (width + a.value_size));
  float* const weights = room.data() - first;  // of query q and row r: at q * width + r
  float* const sums = room.data() + count * width;

  const float* const keys = a.keys.of(block.sequence, group);
  for (int64_t row = first; row < last; row += LANES)
    for (int64_t q = 0; q < count; ++q) {
      if (row >= spans[q].last() || row + LANES <= spans[q].first) continue;
      const int64_t query = begin + q;
      const float* const x = a.queries.of(b, group * shared + query % shared) + query / shared * a.queries.row;
      vector_at(weights + q * width + row) =
          scores_of(x, keys + row * a.keys.row, a.keys.row, last - row, a.size) * a.scale;
    }

  float total[QUERIES];
  for (int64_t q = 0; q < count; ++q) total[q] = weigh(weights + q * width + spans[q].first, spans[q]);

  const float* const values = a.values.of(block.sequence, group);
  const int64_t step = a.values.row, size = a.value_size;
  std::memset(sums, 0, count * size * sizeof(float));
  const auto add = [&](int64_t q, int64_t from, int64_t to) {  // rows of the context that not all queries see
    add_rows<1>(1, weights + q * width + from, width, values + from * step, step, to - from, size, sums + q * size);
  };
  for (int64_t q = 0; q < count; ++q) add(q, spans[q].first, std::min(same_from, spans[q].end));
  add_rows(count, weights + same_from, width, values + same_from * step, step, same_to - same_from, size, sums);
  for (int64_t q = 0; q < count; ++q) {
    add(q, std::max(same_to, spans[q].first), spans[q].end);
    const float* weight = weights + q * width + spans[q].end;
    for (uint64_t bits = spans[q].bits; bits; bits &= bits - 1)
      add_rows<1>(1, weight++, width, values + (spans[q].end + __builtin_ctzll(bits)) * step, step, 1, size, sums + q * size);
    const int64_t node = (begin + q) / shared, head = group * shared + (begin + q) % shared;
    float* const result = a.result + ((b * a.nodes + node) * a.heads + head) * size;
    for (int64_t d = 0; d < size; d += LANES) vector_at(result + d) = vector_at(sums + q * size + d) / total[q];
  }
}

// Which sequence's rows a query sees, where those of all sequences are counted through, `rows` of each.
int64_t sequence_of(const Span& span, int64_t rows) { return span.end / rows; }

// The queries in blocks: neighbours of one sequence, in parts of like size; those that read the same rows follow each
// other. `rows` is 0 where every place in the batch is a sequence, else how many rows each sequence has.
std::vector<Block> blocks_of(const Attention& a, int64_t rows) {
  const int64_t shared = a.heads / a.groups;
  std::vector<Block> found;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t node = 0, next; node < a.nodes; node = next) {
      const Span* const spans = a.spans + b * a.nodes;
      const int64_t sequence = rows ? sequence_of(spans[node], rows) : b;
      for (next = rows ? node + 1 : a.nodes; next < a.nodes && sequence_of(spans[next], rows) == sequence;) ++next;
      const int64_t queries = (next - node) * shared, parts = (queries + QUERIES - 1) / QUERIES;
      const int64_t height = (queries + parts - 1) / parts, first = node * shared, last = next * shared;
      for (int64_t group = 0; group < a.groups; ++group)
        for (int64_t begin = first; begin < last; begin += height)
          found.push_back({b, group, begin, std::min(begin + height, last), sequence, rows * sequence});
    }
  return found;
}

void attend_all(const Attention& a, int64_t rows) {
  const std::vector<Block> blocks = blocks_of(a, rows);
  torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room;
    for (int64_t unit = begin; unit < end; ++unit) attend(a, blocks[unit], room);
  });
}

// The tensor itself, or a copy whose numbers lie side by side.
Tensor side_by_side(const Tensor& given) { return given.stride(3) == 1 ? given : torch::stable::contiguous(given); }

Rows rows_of(const Tensor& tensor) { return {data_of(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// Queries [B, heads, nodes, size], keys [B, groups, rows, size], values [B, groups, rows, value_size] and spans
// [B, 1, nodes, 3] to [B, nodes, heads, value_size]. Or keys and values of more sequences than one place of queries: then
// the spans count the rows of all sequences through, so that those of the next one begin at `rows`.
Tensor tree_attention(
    const Tensor& given, const Tensor& given_keys, const Tensor& given_values, const Tensor& spans, double scale) {
  for (const Tensor& tensor : {given, given_keys, given_values})
    STD_TORCH_CHECK(tensor.dim() == 4 && is_float(tensor), "queries, keys and values: float32, of four dimensions");
  const Tensor queries = side_by_side(given), keys = side_by_side(given_keys), values = side_by_side(given_values);
  const int64_t batch = queries.size(0), heads = queries.size(1), nodes = queries.size(2), size = queries.size(3);
  const int64_t groups = keys.size(1), rows = keys.size(2), value_size = values.size(3);
  STD_TORCH_CHECK(size == keys.size(3) && size % LANES == 0 && value_size % LANES == 0, "sizes: whole vectors");
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0 && values.size(1) == groups, "heads: as many to every group");
  const int64_t sequences = keys.size(0);
  STD_TORCH_CHECK(values.size(0) == sequences && values.size(2) == rows, "rows: as many of values as of keys");
  STD_TORCH_CHECK(batch == sequences || batch == 1, "queries: of every sequence, or in one place");
  const bool through = batch < sequences && rows > 0;
  STD_TORCH_CHECK(
      spans.is_cpu() && spans.is_contiguous() && spans.scalar_type() == torch::headeronly::ScalarType::Long &&
          spans.dim() == 4 && spans.size(0) == batch && spans.size(1) == 1 && spans.size(2) == nodes &&
          spans.size(3) == FIELDS,
      "spans: int64, three for each query");
  const Span* const given_spans = static_cast<const Span*>(spans.data_ptr());
  for (int64_t i = 0; i < batch * nodes; ++i) {
    const Span& span = given_spans[i];
    const int64_t sequence = through ? sequence_of(span, rows) : 0, base = sequence * rows;
    STD_TORCH_CHECK(
        0 <= base && base <= span.first && span.first <= span.end && span.last() <= base + rows && sequence < sequences,
        "spans: rows that are there");
  }
  const int64_t sizes[] = {batch, nodes, heads, value_size};
  const Tensor result = empty(sizes, 4);
  attend_all({rows_of(queries), rows_of(keys), rows_of(values), given_spans, data_of(result), batch, nodes, heads,
              groups, size, value_size, static_cast<float>(scale)}, through ? rows : 0);
  return result;
}

}  // namespace

// The door for code that torch generates.
extern "C" AOTITorchError aoti_torch_cpu_tree_attention(
    AtenTensorHandle queries, AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle spans, double scale,
    AtenTensorHandle* result) {
  return through_door(result, [&] {
    return tree_attention(borrowed(queries), borrowed(keys), borrowed(values), borrowed(spans), scale);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(gorgon, library) {
  library.def("tree_attention(Tensor queries, Tensor keys, Tensor values, Tensor spans, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gorgon, CPU, library) { library.impl("tree_attention", TORCH_BOX(&tree_attention)); }
