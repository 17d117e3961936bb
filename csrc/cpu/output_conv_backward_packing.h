// Both operands of a block copied in small jobs, between the products of the block before: the tiles' unit works on beside
// the vectors'.
#pragma once

#include "output_conv_backward_input.h"

namespace {

// Where some steps of an operand come from and go to.
struct Operand {
  Positions from;
  int64_t position, steps;
  const uint16_t** pixels;  // room for a pointer each, and one before
  uint16_t* lines;
  std::byte* to;
  int64_t next;             // bytes from sixteen channels to the next
  int64_t odd;              // bytes from the even pairs to the odd ones; the left operand has none

  int64_t chunks() const { return (from.channels + tile_channels - 1) / tile_channels; }
  __mmask32 exist(int64_t chunk) const { return first_halves(from.channels - chunk * tile_channels); }
};

constexpr int64_t line_steps = line_positions / step_positions;

// The jobs of an operand, by number; the kind of map and of operand decide what they are.
class Jobs {
 public:
  Jobs() = default;
  Jobs(const Operand& operand, const uint16_t* zeros, bool is_left)
      : operand_(operand), is_left_(is_left), by_pixels_(operand.from.side_by_side()) {
    if (operand.steps == 0) return;
    if (by_pixels_) {
      find_pixels(operand.from, operand.position - 1, operand.steps * step_positions + 1, zeros, operand.pixels);
      per_chunk_ = is_left ? 2 : step_pairs / few_pairs;
      count_ = operand.steps * operand.chunks() * per_chunk_;
    } else {
      // First the lines themselves.
      per_chunk_ = 1 + (is_left ? tile_channels / few_lines : 2 * line_steps);
      count_ = (operand.steps + line_steps - 1) / line_steps * operand.chunks() * per_chunk_;
    }
  }

  int64_t count() const { return count_; }

  void run(int64_t job) const {
    const int64_t part = job % per_chunk_, chunk = job / per_chunk_ % operand_.chunks();
    const int64_t step = job / per_chunk_ / operand_.chunks();
    if (by_pixels_) return is_left_ ? turn(part, chunk, step) : pair(part, chunk, step);
    const int64_t first = step * line_steps, some = std::min(operand_.steps - first, line_steps);
    if (part == 0) {
      const int64_t position = operand_.position + first * step_positions;
      return find_lines(operand_.from, position, some * step_positions, chunk * tile_channels, operand_.lines);
    }
    return is_left_ ? copy_lines(part - 1, chunk, first, some) : pair_lines(part - 1, chunk, first, some);
  }

 private:
  static constexpr int64_t few_lines = 4;

  void turn(int64_t half, int64_t chunk, int64_t step) const {
    const uint16_t* const* pixels = operand_.pixels + 1 + step * step_positions;
    std::byte* to = operand_.to + 2 * chunk * operand_.next + step * tile_bytes;
    turn_pixels(pixels, chunk * tile_channels, operand_.exist(chunk), half, to, operand_.next);
  }

  void pair(int64_t part, int64_t chunk, int64_t step) const {
    const uint16_t* const* pixels = operand_.pixels + 1 + step * step_positions + part * 2 * few_pairs;
    std::byte* even = operand_.to + 2 * chunk * operand_.next + step * tile_bytes + part * few_pairs * pixel_bytes;
    pair_pixels(pixels, chunk * tile_channels, operand_.exist(chunk), even, even + operand_.odd, operand_.next);
  }

  void copy_lines(int64_t part, int64_t chunk, int64_t first, int64_t some) const {
    for (int64_t row = part * few_lines; row < (part + 1) * few_lines; ++row) {
      const uint16_t* line = operand_.lines + row * line_pitch + step_positions;
      std::byte* to = operand_.to + (2 * chunk + row / 16) * operand_.next + first * tile_bytes + row % 16 * pixel_bytes;
      for (int64_t i = 0; i < some; ++i) store_register<false>(to + i * tile_bytes, load_register(line + i * step_positions));
    }
  }

  void pair_lines(int64_t part, int64_t chunk, int64_t first, int64_t some) const {
    const int64_t half = part % 2, i = part / 2;
    if (i >= some) return;
    const uint16_t* line = operand_.lines + (i + 1) * step_positions;
    std::byte* even = operand_.to + (2 * chunk + half) * operand_.next + (first + i) * tile_bytes;
    ::pair_lines(line, half, even);
    ::pair_lines(line - 1, half, even + operand_.odd);
  }

  Operand operand_{};
  bool is_left_ = false, by_pixels_ = false;
  int64_t per_chunk_ = 1, count_ = 0;
};

class Packing {
 public:
  // Evenly over this many steps of the products.
  void start(const Jobs& left, const Jobs& right, int64_t steps) {
    left_ = left;
    right_ = right;
    all_ = left.count() + right.count();
    job_ = due_ = 0;
    steps_ = steps;
  }

  void step() {
    due_ += all_;
    while (due_ >= steps_) {
      due_ -= steps_;
      if (job_ < all_) next();
    }
  }

  void finish() {
    while (job_ < all_) next();
  }

 private:
  __attribute__((noinline)) void next() {
    const int64_t job = job_++;
    if (job < left_.count()) return left_.run(job);
    right_.run(job - left_.count());
  }

  Jobs left_, right_;
  int64_t all_ = 0, job_ = 0, due_ = 0, steps_ = 1;
};

}  // namespace
