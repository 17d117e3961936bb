// Included by transposes.h: any CPU.

template <class T>
constexpr int64_t tile_of = 8;

template <bool streaming, class T>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int64_t j = 0; j < tile_of<T>; ++j) {
    for (int64_t i = 0; i < tile_of<T>; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
