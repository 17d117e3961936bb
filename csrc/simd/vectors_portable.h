// Included by vectors.h: four of the compiler's 16-byte vectors, which every baseline has (SSE2, NEON).

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

struct Floats {
  using Scalar = float;
  using Quarter = Float4;
  static constexpr int width = 16;
  Float4 a, b, c, d;
};

struct Doubles {
  using Scalar = double;
  using Quarter = Double2;
  static constexpr int width = 8;
  Double2 a, b, c, d;
};

// Selects elements of the concatenation of two vectors by index.
#if defined(__clang__)
#define FPN_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
template <class Elements>
struct Numbers {
  typedef int32_t type __attribute__((vector_size(16)));
};
template <>
struct Numbers<Double2> {
  typedef int64_t type __attribute__((vector_size(16)));
};
template <>
struct Numbers<Short8> {
  typedef int16_t type __attribute__((vector_size(16)));
};
#define FPN_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, typename Numbers<decltype(x + y)>::type{__VA_ARGS__})
#endif

constexpr bool little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

// Eight elements of 16 bits as the upper halves of 32-bit words.
struct Words {
  Word4 a, b;
};
inline Words load_words(const void* from) {
  Short8 value;
  __builtin_memcpy(&value, from, sizeof value);
  const Short8 even = little_endian ? Short8{} : value, odd = little_endian ? value : Short8{};
  return {
      (Word4)FPN_SHUFFLE(even, odd, 0, 8, 1, 9, 2, 10, 3, 11),
      (Word4)FPN_SHUFFLE(even, odd, 4, 12, 5, 13, 6, 14, 7, 15)};
}
// Stores the lower halves of words.
inline void store_words(void* to, Word4 a, Word4 b) {
  constexpr int low = little_endian ? 0 : 1;
  const Short8 first = (Short8)a, second = (Short8)b;
  const Short8 value =
      FPN_SHUFFLE(first, second, low, low + 2, low + 4, low + 6, low + 8, low + 10, low + 12, low + 14);
  __builtin_memcpy(to, &value, sizeof value);
}

inline Float4 load_quarter(const float* from) {
  Float4 value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
inline Double2 load_quarter(const double* from) {
  Double2 value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <class Quarter>
inline void store_quarter(void* to, Quarter value) {
  __builtin_memcpy(to, &value, sizeof value);
}

inline Floats load(const float* from) {
  return {load_quarter(from), load_quarter(from + 4), load_quarter(from + 8), load_quarter(from + 12)};
}
inline Doubles load(const double* from) {
  return {load_quarter(from), load_quarter(from + 2), load_quarter(from + 4), load_quarter(from + 6)};
}
inline Floats load(const BFloat16* from) {
  const Words first = load_words(from), second = load_words(from + 8);
  return {(Float4)first.a, (Float4)first.b, (Float4)second.a, (Float4)second.b};
}
inline Float4 from_half(Word4 upper) {
  const Word4 bits = upper >> 16;
  const Word4 sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  // An exact product rebiases the exponent and normalizes denormal halves.
  const Word4 finite = (Word4)((Float4)(rest << 13) * 0x1p112f);
  return (Float4)(sign | ((rest >= 0x7c00u) ? (rest << 13) | 0x7f800000u : finite));
}
inline Floats load(const Half* from) {
  const Words first = load_words(from), second = load_words(from + 8);
  return {from_half(first.a), from_half(first.b), from_half(second.a), from_half(second.b)};
}

// Round to nearest even, in the low half of each word.
inline Word4 to_bfloat16(Float4 value) {
  const Word4 bits = (Word4)value, nan = Word4{} + 0x7fc0u;
  return (value != value) ? nan : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline Word4 to_half(Float4 value) {
  const Word4 bits = (Word4)value;
  const Word4 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14, the smallest normal half, adding 0.5 rounds to the last place of a denormal half, in the low bits.
  const Word4 small = (Word4)((Float4)magnitude + 0.5f) - 0x3f000000u;
  const Word4 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Word4 infinite = Word4{} + 0x7c00u;
  Word4 half = (magnitude < (113u << 23)) ? small : normal;
  half = (magnitude >= (143u << 23)) ? infinite : half;  // 65536 and above
  half = (magnitude > 0x7f800000u) ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
  return sign | half;
}

template <class V>
inline void store(typename V::Scalar* to, V value) {
  constexpr int quarter = V::width / 4;
  store_quarter(to, value.a);
  store_quarter(to + quarter, value.b);
  store_quarter(to + 2 * quarter, value.c);
  store_quarter(to + 3 * quarter, value.d);
}
inline void store(BFloat16* to, Floats value) {
  store_words(to, to_bfloat16(value.a), to_bfloat16(value.b));
  store_words(to + 8, to_bfloat16(value.c), to_bfloat16(value.d));
}
inline void store(Half* to, Floats value) {
  store_words(to, to_half(value.a), to_half(value.b));
  store_words(to + 8, to_half(value.c), to_half(value.d));
}
template <class T, class V>
inline void stream(T* to, V value) {
  store(to, value);
}
inline void end_of_stream() {}

template <class V>
inline V broadcast(typename V::Scalar value) {
  // Subtracting zero, unlike adding it, keeps the sign of a zero.
  const auto quarter = value - typename V::Quarter{};
  return {quarter, quarter, quarter, quarter};
}

template <class V>
inline V add(V x, V y) {
  return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d};
}
template <class V>
inline V multiply(V x, V y) {
  return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d};
}
inline Floats operator+(Floats x, Floats y) { return add(x, y); }
inline Floats operator*(Floats x, Floats y) { return multiply(x, y); }
inline Doubles operator+(Doubles x, Doubles y) { return add(x, y); }
inline Doubles operator*(Doubles x, Doubles y) { return multiply(x, y); }

// weight * value, but 0 if the weight is 0: a pixel that is not read adds nothing even if it is infinite.
template <class Quarter>
inline Quarter weighted_quarter(Quarter weight, Quarter value) {
  return (weight != 0) ? weight * value : Quarter{};
}
template <class V>
inline V weighted(V weight, V value) {
  using Q = typename V::Quarter;
  return {
      weighted_quarter<Q>(weight.a, value.a), weighted_quarter<Q>(weight.b, value.b),
      weighted_quarter<Q>(weight.c, value.c), weighted_quarter<Q>(weight.d, value.d)};
}

inline Float4 gather_quarter(const float* from, const int32_t* index) {
  return Float4{from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
}
inline Double2 gather_quarter(const double* from, const int32_t* index) {
  return Double2{from[index[0]], from[index[1]]};
}
template <class V>
inline V gather_by(const typename V::Scalar* from, const int32_t* index) {
  constexpr int quarter = V::width / 4;
  return {
      gather_quarter(from, index), gather_quarter(from, index + quarter), gather_quarter(from, index + 2 * quarter),
      gather_quarter(from, index + 3 * quarter)};
}
inline Floats gather(const float* from, const int32_t* index) { return gather_by<Floats>(from, index); }
inline Doubles gather(const double* from, const int32_t* index) { return gather_by<Doubles>(from, index); }

inline Float4 low_twice(Float4 x) { return FPN_SHUFFLE(x, x, 0, 0, 1, 1); }
inline Float4 high_twice(Float4 x) { return FPN_SHUFFLE(x, x, 2, 2, 3, 3); }
inline Double2 low_twice(Double2 x) { return FPN_SHUFFLE(x, x, 0, 0); }
inline Double2 high_twice(Double2 x) { return FPN_SHUFFLE(x, x, 1, 1); }

// Each element twice: the first and the second half of the doubled line.
template <class V>
inline void duplicate(V value, V& low, V& high) {
  low = {low_twice(value.a), high_twice(value.a), low_twice(value.b), high_twice(value.b)};
  high = {low_twice(value.c), high_twice(value.c), low_twice(value.d), high_twice(value.d)};
}

inline Float4 pair_sum(Float4 x, Float4 y) {
  return FPN_SHUFFLE(x, y, 0, 2, 4, 6) + FPN_SHUFFLE(x, y, 1, 3, 5, 7);
}
inline Double2 pair_sum(Double2 x, Double2 y) { return FPN_SHUFFLE(x, y, 0, 2) + FPN_SHUFFLE(x, y, 1, 3); }

// low[0] + low[1], low[2] + low[3], ..., then the same of high.
template <class V>
inline V pair_sums(V low, V high) {
  return {pair_sum(low.a, low.b), pair_sum(low.c, low.d), pair_sum(high.a, high.b), pair_sum(high.c, high.d)};
}
#undef FPN_SHUFFLE

// Conversions between Floats and Doubles: the halves of a vector, and eight floats from and to memory.
inline Doubles widened(Float4 x, Float4 y) {
  return {Double2{x[0], x[1]}, Double2{x[2], x[3]}, Double2{y[0], y[1]}, Double2{y[2], y[3]}};
}
inline Doubles low_half(Floats value) { return widened(value.a, value.b); }
inline Doubles high_half(Floats value) { return widened(value.c, value.d); }
// With `widened` of two loads the bilinear gradient took 1.3 times as long (g++ 12, Zen 3).
inline Doubles load_wide(const float* from) {
  const auto two = [&](int i) { return Double2{from[i], from[i + 1]}; };
  return {two(0), two(2), two(4), two(6)};
}
inline void store(float* to, Doubles value) {
  double wide[Doubles::width];
  store(wide, value);
  for (int i = 0; i < Doubles::width; ++i) to[i] = static_cast<float>(wide[i]);
}
