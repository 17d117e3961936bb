#include "../operators.h"
#include "capability.h"
#include "maps.h"
#include "tables.h"

namespace fpn::cpu {

namespace {

int64_t scratch_bytes(const UpsampleAdd& call) {
  const int64_t width = call.lateral.width, top_width = call.top.width;
  const int64_t element = element_size(call.dtype);
  if (call.channels_last) {
    const int64_t lateral = call.lateral.stride_c == 1 ? 0 : line_bytes(width * call.channels, element);
    const int64_t top = call.top.stride_c == 1 ? 0 : 2 * line_bytes(top_width * call.channels, element);
    return lateral + top;
  }
  return 3 * line_bytes(width, 8) + 2 * line_bytes(top_width, 8);
}

bool may_stream(const UpsampleAdd& call, int64_t numel) {
  const int64_t element = element_size(call.dtype);
  const int64_t line = (call.channels_last ? call.channels : call.lateral.width) * element;
  return numel * element >= streaming_bytes && reinterpret_cast<uintptr_t>(call.out.data) % 64 == 0 && line % 64 == 0;
}

}  // namespace

void upsample_add(const Tensor& top, const Tensor& lateral, int64_t mode, double gain, Tensor out) {
  const Dtype dtype = dtype_of(lateral);
  UpsampleAdd call{};
  call.dtype = dtype;
  call.top = map_of(top);
  call.lateral = map_of(lateral);
  call.out = result_of(out);
  call.channels = lateral.size(1);
  const ForwardTable rows(call.top.height, call.lateral.height, static_cast<Mode>(mode), dtype);
  const ForwardTable columns(call.top.width, call.lateral.width, static_cast<Mode>(mode), dtype);
  call.rows = rows.axis();
  call.columns = columns.axis();
  call.gain = gain;
  call.bilinear = static_cast<Mode>(mode) == Mode::bilinear;
  call.channels_last = call.out.stride_x != 1;
  call.streaming = may_stream(call, lateral.numel());
  const int64_t batch = lateral.size(0), height = call.lateral.height, width = call.lateral.width;
  const int64_t units = call.channels_last ? batch * height : batch * call.channels * height;
  const int64_t elements = call.channels_last ? width * call.channels : width;
  run_units(FPN_CHOOSE(upsample_add_rows), call, units, elements, scratch_bytes(call));
}

}  // namespace fpn::cpu
