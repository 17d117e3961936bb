#include "../isa.h"
#include "../layout.h"
#include "../parallel.h"
#include "../resize_table.h"
#include "kernel.h"

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
  return held_rows_bytes(width, top_width) + line_bytes(width, 8);
}

// Elements of the widest vector.
constexpr int64_t max_vector = 16;

// Whether out may be the lateral.  The last vector of a line overlaps the one before it unless lines are whole vectors.
bool in_place(const UpsampleAdd& call, const Output& out, const Argument& lateral) {
  const int64_t line = call.channels_last ? call.channels : call.lateral.width;
  return out.is(lateral) && line % max_vector == 0;
}

}  // namespace

void upsample_add(
    const Tensor& top_tensor, const Tensor& lateral_tensor, int64_t mode_number, double gain, Tensor out_tensor) {
  const Mode mode = mode_of(mode_number);
  const Argument lateral("lateral", lateral_tensor, {any, any, any, any}, aoti_torch_device_type_cpu());
  const Argument top("top", top_tensor, {lateral.size(0), lateral.size(1), any, any}, lateral);
  const Output out("out", out_tensor, lateral.sizes(), lateral);
  UpsampleAdd call{};
  call.dtype = lateral.dtype();
  call.top = top.map();
  call.lateral = lateral.map();
  call.out = out.result();
  call.channels = lateral.size(1);
  call.gain = gain;
  call.bilinear = mode == Mode::bilinear;
  call.channels_last = call.out.stride_x != 1;
  call.streaming = may_stream(out);
  out.check_apart({&top, in_place(call, out, lateral) ? nullptr : &lateral});
  if (out.numel() == 0) return;
  top.check_pixels();
  const ResizeTable rows(call.top.height, call.lateral.height, mode, call.dtype);
  const ResizeTable columns(call.top.width, call.lateral.width, mode, call.dtype);
  call.rows = rows.axis();
  call.columns = columns.axis();
  const int64_t batch = lateral.size(0), height = call.lateral.height, width = call.lateral.width;
  const int64_t units = call.channels_last ? batch * height : batch * call.channels * height;
  const int64_t elements = call.channels_last ? width * call.channels : width;
  run_units(FPN_SIMD_KERNEL(upsample_add_rows), call, units, elements, scratch_bytes(call));
}

}  // namespace fpn::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fpn_kernels_native, m) {
  m.def("upsample_add(Tensor top, Tensor lateral, int mode, float gain, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fpn_kernels_native, CPU, m) {
  m.impl("upsample_add", TORCH_BOX(&fpn::cpu::upsample_add));
}
