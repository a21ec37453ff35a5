// The CUDA kernels of vector quantization on the CPU: any bytes are a valid call, whose indices must be the
// definition's and whose values fp64's, in any order of threads.
#include <cstdlib>

#include "vq_case.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vaeops;
  using namespace vaeops::test;
  size_t at = 0;
  const auto next = [&](int choices) { return at < size ? data[at++] % choices : 0; };
  VqCase c;
  const int op = next(4);
  c.rows.clear();
  for (int rank = next(3); rank > 0; --rank) c.rows.push_back(next(9));
  c.dims = 1 + next(40);
  c.codes = 1 + next(2) * 128 + next(200);
  c.dtype = static_cast<Dtype>(next(4));
  c.codebook_dtype = static_cast<Dtype>(next(4));
  c.layout = static_cast<Layout>(next(3));
  c.data = static_cast<Data>(next(static_cast<int>(Data::kinds)));
  c.metric = static_cast<Metric>(next(3));
  c.masked = next(2) != 0;
  c.int32 = next(2) != 0;
  c.special = next(3) == 0;
  c.reduction = static_cast<RowReduction>(next(4) - 1);
  c.estimator = static_cast<Estimator>(next(3));
  c.weighted = next(2) != 0;
  // Sums of huge values in halves are infinite, and tiny ones are zero: nothing to compare.
  const bool wild = c.data == Data::tiny || c.data == Data::huge || c.data == Data::cauchy;
  cuda_host::options.multiprocessors = 1 + next(8);
  if (op == 0) {
    c.k = next(2) * next(static_cast<int>(c.codes < 20 ? c.codes : 20) + 1);
    check_assign(c);
  } else if (op == 1 && !wild) {
    check_gather(c);
  } else if (op == 2 && !wild) {
    const bool through = next(3) != 0;
    c.special = false;
    check_backward(c, through, next(3) != 0);
  } else if (op == 3 && !wild) {
    const double absmax = (next(6) - 1) * 1.5;
    check_segment_sum(c, c.special || next(2) != 0, absmax < 0 ? -1 : absmax);
  }
  if (failures > 0) std::abort();
  return 0;
}
