// A call of the Gaussian step from a fuzzer's bytes: any bytes are a valid call.
#pragma once
#include <cstdlib>

#include "run_gaussian.h"

namespace vaeops::test {

inline Case decode(const uint8_t* data, size_t size) {
  size_t at = 0;
  const auto next = [&](int choices) { return at < size ? data[at++] % choices : 0; };
  Case c;
  const int rank = 1 + next(4);
  for (int d = 0; d < rank; ++d) {
    c.shape.push_back(1 + next(d == rank - 1 ? 200 : 7));
  }
  c.batch_ndim = next(rank + 1);
  c.dtype = static_cast<Dtype>(next(4));
  c.reduction = static_cast<Reduction>(next(7) - 1);
  c.param = static_cast<Param>(next(3));
  c.sampled = c.reduction == Reduction::off || next(4) != 0;
  c.clamped = next(2) != 0;
  c.temperature = next(5) * 0.5;
  c.eps_given = c.sampled && next(3) == 0;
  c.eps_dtype = static_cast<Dtype>(next(4));
  c.prior_dtype = static_cast<Dtype>(next(4));
  c.layout = static_cast<Layout>(next(3));
  c.expanded = next(4) == 0;
  if (next(2) != 0) {
    for (int d = 0; d < rank; ++d) c.prior_kept.push_back(next(2) != 0);
  }
  const int stream_dims = next(c.batch_ndim + 1);
  c.streams = product(c.shape, 0, static_cast<size_t>(stream_dims));
  return c;
}

}  // namespace vaeops::test
