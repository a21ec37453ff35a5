// The reductions of a per-element value, over tiles. Which elements are summed in which order depends on the shape
// alone: results are bit-equal from run to run and for any number of threads, and a sample's sum does not depend on the
// others.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/gaussian_tiles.h"
#include "cpu/strided.h"
#include "vaeops.h"

namespace vaeops::cpu {

constexpr int64_t kShortRow = 256;   // samples of fewer elements share tiles
constexpr int64_t kWideRow = 16384;  // from here on a mean over the batch is split by columns, not by rows

// Rows and tasks end together, so a tile of up to a whole task is whole rows, or lies within one.
inline bool rows_fit_tasks(const Shape& shape) {
  return shape.width > 0 && (kChunk % shape.width == 0 || shape.width % kChunk == 0);
}

// Runs `tile(begin, n, sink)` over every element of `shape` and reduces what it yields into `out`. n is at most `step`
// (kTile, or kChunk for a tile function that needs no buffers), and kTile where elements are summed here.
template <class C, class Tile>
inline void reduce_tiles(const Shape& shape, Reduction reduction, C* out, int64_t step, ParallelFor parallel,
                         const Tile& tile) {
  const int64_t n = shape.n, rows = shape.rows, width = shape.width;
  const double factor = reduction_scale(reduction, shape);
  const ParallelFor loop = n <= kSerial ? serial : parallel;

  if (reduction == Reduction::off || reduction == Reduction::none) {
    parallel_for(loop, ceil_div(n, kChunk), [&](int64_t task) {
      const int64_t end = std::min(n, (task + 1) * kChunk);
      for (int64_t at = task * kChunk; at < end; at += step) {
        Sink<C> sink;
        if (reduction == Reduction::none) sink.elements = out + at;
        tile(at, std::min(step, end - at), sink);
      }
    });
    return;
  }

  // Sums the elements [begin, end) in lanes.
  const auto sum = [&](int64_t begin, int64_t end) {
    alignas(64) C lanes[kLanes] = {};
    Sink<C> sink;
    sink.lanes = lanes;
    for (int64_t at = begin; at < end; at += step) tile(at, std::min(step, end - at), sink);
    return sum_lanes(lanes);
  };

  if (reduction == Reduction::sample) {
    if (width < kShortRow) {  // whole rows to a tile, summed one by one
      const int64_t tile_rows = width > 0 ? kTile / width : 1, task_rows = tile_rows * (kChunk / kTile);
      parallel_for(loop, ceil_div(rows, task_rows), [&](int64_t task) {
        alignas(64) C elements[kTile];
        const int64_t end = std::min(rows, (task + 1) * task_rows);
        for (int64_t row = task * task_rows; row < end; row += tile_rows) {
          const int64_t count = std::min(tile_rows, end - row);
          Sink<C> sink;
          sink.elements = elements;
          if (width > 0) tile(row * width, count * width, sink);
          for (int64_t r = 0; r < count; ++r) {
            double s = 0;
            for (int64_t i = 0; i < width; ++i) s += elements[r * width + i];
            out[row + r] = static_cast<C>(s);
          }
        }
      });
      return;
    }
    if (width % kLanes == 0 && width <= step) {  // whole rows to a tile, summed by the kernel
      const int64_t tile_rows = step / width, task_rows = tile_rows * (kChunk / step);
      parallel_for(loop, ceil_div(rows, task_rows), [&](int64_t task) {
        const int64_t end = std::min(rows, (task + 1) * task_rows);
        for (int64_t row = task * task_rows; row < end; row += tile_rows) {
          Sink<C> sink;
          sink.row_sums = out + row;
          sink.row = width;
          tile(row * width, std::min(tile_rows, end - row) * width, sink);
        }
      });
      return;
    }
    const int64_t pieces = ceil_div(width, kChunk);
    std::vector<double> partial(static_cast<size_t>(rows * pieces));
    parallel_for(loop, rows * pieces, [&](int64_t task) {
      const int64_t row = task / pieces, piece = task % pieces;
      partial[task] = sum(row * width + piece * kChunk, row * width + std::min(width, (piece + 1) * kChunk));
    });
    for (int64_t row = 0; row < rows; ++row) {
      double s = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) s += partial[row * pieces + piece];
      out[row] = static_cast<C>(s);
    }
    return;
  }

  if (reduction == Reduction::dim) {
    std::fill(out, out + width, C(0));
    if (n == 0) return;
    if (width >= kWideRow) {  // a task owns a stretch of columns and goes down the rows
      parallel_for(loop, ceil_div(width, kTile), [&](int64_t task) {
        alignas(64) C elements[kTile];
        const int64_t column = task * kTile, count = std::min(kTile, width - column);
        double sums[kTile] = {};
        for (int64_t row = 0; row < rows; ++row) {
          Sink<C> sink;
          sink.elements = elements;
          tile(row * width + column, count, sink);
          for (int64_t i = 0; i < count; ++i) sums[i] += elements[i];
        }
        for (int64_t i = 0; i < count; ++i) out[column + i] = static_cast<C>(sums[i] * factor);
      });
      return;
    }
    const int64_t chunks = ceil_div(n, kChunk), groups = std::min<int64_t>(kTaskGroups, chunks);
    std::vector<double> sums(static_cast<size_t>(groups * width));
    parallel_for(loop, groups, [&](int64_t group) {
      alignas(64) C elements[kTile];
      double* own = sums.data() + group * width;
      const int64_t end = std::min(n, (group + 1) * chunks / groups * kChunk);
      for (int64_t at = group * chunks / groups * kChunk; at < end; at += kTile) {
        const int64_t count = std::min(kTile, end - at);
        Sink<C> sink;
        sink.elements = elements;
        tile(at, count, sink);
        for (int64_t i = 0, column = at % width; i < count;) {
          const int64_t run = std::min(count - i, width - column);
          for (int64_t k = 0; k < run; ++k) own[column + k] += elements[i + k];
          i += run;
          column = 0;
        }
      }
    });
    for (int64_t i = 0; i < width; ++i) {
      double s = 0;
      for (int64_t group = 0; group < groups; ++group) s += sums[group * width + i];
      out[i] = static_cast<C>(s * factor);
    }
    return;
  }

  const int64_t chunks = ceil_div(n, kChunk);  // one number for all
  std::vector<double> partial(static_cast<size_t>(chunks));
  parallel_for(loop, chunks,
               [&](int64_t task) { partial[task] = sum(task * kChunk, std::min(n, (task + 1) * kChunk)); });
  double s = 0;
  for (double p : partial) s += p;
  *out = static_cast<C>(s * factor);
}

// Runs `tile(begin, n)` over every element, in tasks of a fixed size; n is at most `step`, and no tile crosses the end
// of a row of `row` elements.
template <class Tile>
inline void for_each_tile(int64_t n, int64_t row, int64_t step, ParallelFor parallel, const Tile& tile) {
  parallel_for(n <= kSerial ? serial : parallel, ceil_div(n, kChunk), [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kChunk);
    for (int64_t at = task * kChunk; at < end;) {
      const int64_t count = std::min({step, end - at, row - at % row});
      tile(at, count);
      at += count;
    }
  });
}

}  // namespace vaeops::cpu
