// Growth of a dynamic tree: what `DynamicDrafter` does in Python, for where Python would take a tenth of a step.
//
// Invariant: the same draft as in Python, to the last bit of every rate. So sums and products are taken in the same
// order, in doubles, and the compiler may not fuse them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <queue>
#include <unordered_map>
#include <vector>

namespace {

// LONGEST, CONTINUATIONS, LEVELS, FREQUENCIES, BINS, PLACES, LONGEST_MATCH, OFFERS, DEEPEST and MOST_NODES come from Python.
constexpr int NOBODY = -1;
constexpr int COPIED = (LONGEST_MATCH + 1) * OFFERS;

// The latest tokens of a text, the last one last.
struct Suffix {
  int32_t tokens[LONGEST_MATCH];
  int length = 0;

  void push(int32_t token) {
    if (length == LONGEST_MATCH)
      std::memmove(tokens, tokens + 1, (LONGEST_MATCH - 1) * sizeof(int32_t));
    else
      ++length;
    tokens[length - 1] = token;
  }
  int32_t from_end(int place) const { return tokens[length - 1 - place]; }
};

// A phrase's tokens from its end, NOBODY beyond its beginning.
struct Phrase {
  int32_t tokens[LONGEST];
  bool operator==(const Phrase& other) const { return !std::memcmp(tokens, other.tokens, sizeof(tokens)); }
};

struct PhraseHash {
  size_t operator()(const Phrase& phrase) const {
    uint64_t hash = 0;
    for (int32_t token : phrase.tokens) {
      hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

struct Following {
  int32_t total, distinct, tokens[CONTINUATIONS], counts[CONTINUATIONS];
  int32_t count(int32_t token) const {
    for (int i = 0; i < CONTINUATIONS; ++i)
      if (tokens[i] == token) return counts[i];
    return 0;
  }
};

struct Book {
  std::unordered_map<Phrase, Following, PhraseHash> phrases;
  std::vector<double> shares;  // by token; the last one is any other's
  std::vector<uint8_t> frequencies;
  double borders[LEVELS - 1];

  size_t place(int32_t token) const { return std::min<size_t>(token, shares.size() - 1); }
};

// Borders are those of the bins; tokens: [vocabulary][2].
struct Tables {
  const double *borders, *bins, *levels, *standings, *evidence, *tokens;
  int64_t heads, vocabulary;
};

struct Settings {
  const Book* book;
  const Tables* tables;
  int64_t nodes, width;
  double threshold;
};

// What the heads that were read say: numbers: [2][heads][width], tokens and log-probabilities.
struct Choices {
  const double* numbers;
  int64_t heads, width;
};

struct Candidate {
  int32_t token, bin = 0, standing = PLACES - 1;  // among the head's choices
  int32_t matched = 0, place = 0;                 // in the context
};

struct Waiting {
  double rate;
  int32_t parent, token;
  Suffix suffix;
  // Whether it comes later than another: Python's order of (-rate, parent, token).
  bool operator<(const Waiting& other) const {
    if (rate != other.rate) return rate < other.rate;
    return parent != other.parent ? parent > other.parent : token > other.token;
  }
};

// The tokens that followed one match, latest first.
struct Offers {
  int32_t tokens[OFFERS];
  int count = 0;
  void see(int32_t token) {
    if (count < OFFERS && std::find(tokens, tokens + count, token) == tokens + count) tokens[count++] = token;
  }
};

class Growth {
 public:
  Growth(const Settings& settings, const int32_t* context, int64_t length, const Choices& choices)
      : settings_(settings), book_(*settings.book), tables_(*settings.tables), context_(context), length_(length),
        choices_(choices) {
    const size_t most = 1 + *std::max_element(context, context + length);
    if (present_.size() < most) present_.resize(most);
    if (++call_ == 0) std::fill(present_.begin(), present_.end(), 0), call_ = 1;
    for (int64_t i = 0; i < length; ++i) present_[context[i]] = call_;
  }

  // Args: numbers: of a draft that has its root.
  int64_t draft(int64_t* numbers) {
    const int64_t nodes = settings_.nodes;
    int64_t *tokens = numbers, *parents = tokens + MOST_NODES, *depths = parents + MOST_NODES;
    int64_t* bits = depths + MOST_NODES;
    Suffix suffix;
    for (int64_t i = std::max<int64_t>(0, length_ - LONGEST_MATCH); i < length_; ++i) suffix.push(context_[i]);
    int64_t count = 1;
    const auto grow = [&](int64_t node, int64_t depth, double rate, const Suffix& behind) {
      const int64_t head = std::min(depth, tables_.heads);
      children(behind, head);
      for (const Candidate& candidate : candidates_) {
        const double mine = rate / (1 + std::exp(-odds(head, candidate)));
        if (mine >= settings_.threshold) waiting_.push({mine, static_cast<int32_t>(node), candidate.token, behind});
      }
    };
    if (nodes > 1) grow(0, 0, 1.0, suffix);
    while (!waiting_.empty() && count < nodes) {
      const Waiting best = waiting_.top();
      waiting_.pop();
      const int64_t node = count++;
      tokens[node] = best.token, parents[node] = best.parent, depths[node] = depths[best.parent] + 1;
      bits[node] = bits[best.parent] | static_cast<int64_t>(uint64_t{1} << node);
      if (depths[node] < DEEPEST && count < nodes) {
        Suffix behind = best.suffix;
        behind.push(best.token);
        grow(node, depths[node], best.rate, behind);
      }
    }
    return count;
  }

 private:
  // What is proposed behind a text that ends so, each token once.
  void children(const Suffix& suffix, int64_t head) {
    candidates_.clear();
    best_ = 0;
    const bool read = head < std::min(tables_.heads, choices_.heads);
    const double* const listed = choices_.numbers + head * choices_.width;
    const double* const logprobs = listed + choices_.heads * choices_.width;
    for (int64_t i = 0; read && i < std::min(settings_.width, choices_.width); ++i) {
      const double* const end = tables_.borders + BINS - 2;
      const auto bin = std::upper_bound(tables_.borders, end, logprobs[i]) - tables_.borders + 1;
      if (!i) best_ = static_cast<int>(bin);
      const int32_t standing = static_cast<int32_t>(std::min<int64_t>(i, PLACES - 1));
      candidates_.push_back({static_cast<int32_t>(listed[i]), static_cast<int32_t>(bin), standing});
    }
    Offers offers[LONGEST_MATCH + 1];
    for (int64_t place = length_ - 1; place > 0; --place)
      if (context_[place - 1] == suffix.from_end(0)) {
        const int most = static_cast<int>(std::min<int64_t>(suffix.length, place));
        for (int size = 1; size <= most && context_[place - size] == suffix.from_end(size - 1); ++size)
          offers[size].see(context_[place]);
      }
    longest_ = 0;
    for (int size = LONGEST_MATCH; size > 0; --size) {
      if (!longest_ && offers[size].count) longest_ = size;
      for (int i = 0; i < offers[size].count; ++i) {
        Candidate& candidate = of(offers[size].tokens[i]);
        if (!candidate.matched) candidate.matched = size, candidate.place = i;
      }
    }
    endings_ = 0;
    Phrase phrase;
    std::fill(phrase.tokens, phrase.tokens + LONGEST, NOBODY);
    for (int size = 1; size <= std::min(LONGEST, suffix.length); ++size) {
      phrase.tokens[size - 1] = suffix.from_end(size - 1);
      const auto found = book_.phrases.find(phrase);
      if (found != book_.phrases.end()) known_[endings_++] = &found->second;
    }
    if (endings_)
      for (int32_t token : known_[endings_ - 1]->tokens)
        if (token != NOBODY) of(token);
  }

  Candidate& of(int32_t token) {
    for (Candidate& candidate : candidates_)
      if (candidate.token == token) return candidate;
    candidates_.push_back({token});
    return candidates_.back();
  }

  double odds(int64_t head, const Candidate& candidate) const {
    const size_t place = book_.place(candidate.token);
    double share = book_.shares[place];
    for (int i = 0; i < endings_; ++i) {
      const Following& found = *known_[i];
      share = (found.count(candidate.token) + found.distinct * share) / (found.total + found.distinct);
    }
    const auto level = std::upper_bound(book_.borders, book_.borders + LEVELS - 1, share) - book_.borders;
    const int evidence = (candidate.matched * (LONGEST_MATCH + 1) + longest_) * OFFERS + candidate.place;
    const size_t token = candidate.token;
    const bool present = token < present_.size() && present_[token] == call_;
    const bool weighed = candidate.token < tables_.vocabulary;
    const double own = weighed ? tables_.tokens[2 * token + (evidence >= COPIED)] : 0.0;
    const double found = tables_.evidence[(evidence * FREQUENCIES + book_.frequencies[place]) * 2 + present];
    const double by_head =
        tables_.bins[head * BINS + candidate.bin] + tables_.standings[best_ * PLACES + candidate.standing];
    return by_head + tables_.levels[head * LEVELS + level] + found + own;
  }

  const Settings& settings_;
  const Book& book_;
  const Tables& tables_;
  const int32_t* const context_;
  const int64_t length_;
  const Choices choices_;
  int best_ = 0, longest_ = 0, endings_ = 0;
  const Following* known_[LONGEST];
  std::vector<Candidate> candidates_;
  std::priority_queue<Waiting> waiting_;
  // By token the last call whose context had it, so that nothing has to be cleared.
  static thread_local std::vector<uint32_t> present_;
  static thread_local uint32_t call_;
};

thread_local std::vector<uint32_t> Growth::present_;
thread_local uint32_t Growth::call_ = 0;

}  // namespace

// Args: endings: [phrases][LONGEST], from the last token to the first, NOBODY beyond; tokens, counts: [phrases]
// [CONTINUATIONS], both NOBODY where there are fewer; shares, frequencies: [vocabulary + 1].
extern "C" void* gorgon_book(
    int64_t phrases, const int32_t* endings, const int32_t* totals, const int32_t* distinct, const int32_t* tokens,
    const int32_t* counts, int64_t vocabulary, const double* shares, const uint8_t* frequencies,
    const double* borders) {
  auto* const book = new Book;
  book->shares.assign(shares, shares + vocabulary + 1);
  book->frequencies.assign(frequencies, frequencies + vocabulary + 1);
  std::copy(borders, borders + LEVELS - 1, book->borders);
  book->phrases.reserve(phrases);
  for (int64_t i = 0; i < phrases; ++i) {
    Phrase phrase;
    Following following{totals[i], distinct[i], {}, {}};
    std::copy_n(endings + i * LONGEST, LONGEST, phrase.tokens);
    std::copy_n(tokens + i * CONTINUATIONS, CONTINUATIONS, following.tokens);
    std::copy_n(counts + i * CONTINUATIONS, CONTINUATIONS, following.counts);
    book->phrases.emplace(phrase, following);
  }
  return book;
}

extern "C" void gorgon_close_book(void* book) { delete static_cast<Book*>(book); }

// Args: choices: [2][heads][width]; draft: [4][MOST_NODES], tokens, parents, depths and bits, the root's written and
// the others' fillers. Returns: the draft's nodes.
extern "C" int64_t gorgon_draft(
    const Settings* settings, const int32_t* context, int64_t length, const double* choices, int64_t heads,
    int64_t width, int64_t* draft) {
  return Growth(*settings, context, length, {choices, heads, width}).draft(draft);
}
