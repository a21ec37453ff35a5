// Gather, its backward and sums by index in C++: any bytes are valid calls with any values. Each instruction set,
// layout and number of threads gives the bits that the plain kernels give of contiguous rows; the sums are also those
// of a loop.
#include <algorithm>
#include <cstdlib>

#include "check.h"
#include "tensors.h"

namespace vaeops::test {
namespace {

void serial(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }
// The tasks one by one and backwards, as if each ran on a thread of its own.
void backwards(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  while (n-- > 0) body(context, n, n + 1);
}

struct Bytes {
  const uint8_t* data;
  size_t size;
  int next(int choices) {
    if (size == 0) return 0;
    --size;
    return *data++ % choices;
  }
};

struct VqCall {
  Sizes rows, shape;  // R, [*R, D]
  int64_t n, dims, codes;
  Dtype dtype, codebook_dtype, out;
  Tensor x, gq, codebook, w;
  std::vector<int64_t> indices;
  Estimator estimator;
  RowReduction reduction;
  bool skip_nonfinite, weighted, fixed;
  double absmax;
};

using Outputs = std::vector<std::vector<char>>;

void random_values(Tensor& t, Bytes& bytes) {
  for (int64_t i = 0; i < t.elements * bytes_of(t.dtype); ++i) t.data()[i] = static_cast<char>(bytes.next(256));
}

// x in another layout, the same values.
Tensor laid_out(const Sizes& shape, const Tensor& x, Layout layout) {
  Tensor t = make(shape, x.dtype, layout);
  const int64_t size = bytes_of(x.dtype);
  for (int64_t i = 0; i < product(shape); ++i) {
    std::memcpy(t.data() + offset_of(shape, t.stride, i) * size, x.data() + i * size, static_cast<size_t>(size));
  }
  return t;
}

std::vector<char> in_order(const Sizes& shape, const Tensor& t) {
  std::vector<char> all;
  const int64_t size = bytes_of(t.dtype);
  for (int64_t i = 0; i < product(shape); ++i) {
    const char* const at = t.data() + offset_of(shape, t.stride, i) * size;
    all.insert(all.end(), at, at + size);
  }
  return all;
}

Outputs run(VqCall& c, Layout layout, ParallelFor parallel) {
  const Tensor x = laid_out(c.shape, c.x, layout), gq = laid_out(c.shape, c.gq, layout);
  const Tensor quantized = make(c.shape, c.dtype, layout), gx = make(c.shape, c.dtype, layout);
  const Dtype wide = compute(c.dtype) == Dtype::f64 ? Dtype::f64 : compute(c.codebook_dtype);
  const Tensor loss = make({c.reduction == RowReduction::none ? c.n : 1}, wide);
  const Dtype out = c.fixed ? Dtype::f64 : c.out;  // int64 is as long
  const Tensor counts = make({c.codes}, out), sums = make({c.codes, c.dims}, out);
  const auto by_row = [](Sizes stride) {
    stride.pop_back();
    return stride;
  };
  const Merge merge(c.rows, {by_row(x.stride), by_row(gq.stride), by_row(quantized.stride), by_row(gx.stride)});
  const auto rows = [&](const Tensor& t, size_t k) { return Rows{merge.operand(t, k), t.stride.back()}; };
  const Indices indices{c.indices.data(), false};

  VqGather gather{};
  gather.shape = merge.shape(c.n, c.n);
  gather.indices = indices;
  gather.codebook = c.codebook.data();
  gather.codebook_dtype = c.codebook_dtype;
  gather.x = rows(x, 0);
  gather.quantized = rows(quantized, 2);
  gather.dims = c.dims;
  gather.codes = c.codes;
  gather.fill = 0.5;
  gather.reduction = c.reduction;
  gather.loss = loss.data();
  cpu::vq_gather(gather, parallel);

  VqGatherBackward backward{};
  backward.shape = gather.shape;
  backward.indices = indices;
  backward.codebook = c.codebook.data();
  backward.codebook_dtype = c.codebook_dtype;
  backward.x = gather.x;
  backward.gq = rows(gq, 1);
  backward.gx = rows(gx, 3);
  Tensor w = make({c.n}, wide);
  for (int64_t i = 0; i < c.n; ++i) w.set(i, c.w.at(i));
  backward.w = w.data();
  backward.w_per_row = c.weighted;
  backward.dims = c.dims;
  backward.codes = c.codes;
  backward.estimator = c.estimator;
  cpu::vq_gather_backward(backward, parallel);

  VqSegmentSum sum{};
  sum.shape = gather.shape;
  sum.indices = indices;
  sum.values = gather.x;
  sum.weights = c.weighted && !c.fixed ? c.w.data() : nullptr;
  sum.weights_f64 = sum.absmax_f64 = true;
  sum.absmax = c.fixed ? &c.absmax : nullptr;
  sum.dims = c.dims;
  sum.codes = c.codes;
  sum.skip_nonfinite = c.skip_nonfinite || c.fixed;
  sum.out_f64 = out == Dtype::f64;
  sum.counts = counts.data();
  sum.sums = sums.data();
  cpu::vq_segment_sum(sum, parallel);
  return {in_order(c.shape, quantized), loss.contents(), in_order(c.shape, gx), counts.contents(), sums.contents()};
}

// Every NaN as one: its bits are nobody's promise.
std::vector<double> values(const std::vector<char>& bytes, Dtype dtype) {
  std::vector<double> all;
  for (size_t at = 0; at < bytes.size(); at += bytes_of(dtype)) all.push_back(read(bytes.data() + at, dtype));
  return all;
}
bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](double x, double y) {
    return std::isnan(x) ? std::isnan(y) : x == y && std::signbit(x) == std::signbit(y);
  });
}

void check_sums(const VqCall& c, const Outputs& got) {
  std::vector<double> counts(c.codes), sums(c.codes * c.dims);
  for (int64_t i = 0; i < c.n; ++i) {
    bool used = c.indices[i] >= 0;
    for (int64_t d = 0; d < c.dims; ++d) used = used && (!c.skip_nonfinite || std::isfinite(c.x.at(i * c.dims + d)));
    if (!used) continue;
    const double weight = c.weighted ? c.w.at(i) : 1;
    counts[c.indices[i]] += weight;
    for (int64_t d = 0; d < c.dims; ++d) sums[c.indices[i] * c.dims + d] += weight * c.x.at(i * c.dims + d);
  }
  for (std::vector<double>* all : {&counts, &sums}) {
    for (double& v : *all) v = c.out == Dtype::f32 ? static_cast<float>(v) : v;
  }
  CHECK(same(values(got[3], c.out), counts), "counts");
  CHECK(same(values(got[4], c.out), sums), "sums");
}

}  // namespace

void check_vq(Bytes bytes) {
  VqCall c{};
  const int rank = bytes.next(4);
  for (int d = 0; d < rank; ++d) c.rows.push_back(1 + bytes.next(d == rank - 1 ? 70 : 3));
  c.dims = 1 + bytes.next(40);
  c.codes = 1 + bytes.next(40);
  c.n = product(c.rows);
  c.shape = c.rows;
  c.shape.push_back(c.dims);
  c.dtype = static_cast<Dtype>(bytes.next(4));
  c.codebook_dtype = static_cast<Dtype>(bytes.next(4));
  c.out = bytes.next(2) != 0 ? Dtype::f64 : Dtype::f32;
  c.estimator = static_cast<Estimator>(bytes.next(3));
  c.reduction = static_cast<RowReduction>(bytes.next(3));
  c.skip_nonfinite = bytes.next(2) != 0;
  c.weighted = bytes.next(2) != 0;
  c.fixed = bytes.next(3) == 0;
  c.absmax = std::ldexp(bytes.next(16), 8 * (bytes.next(64) - 32));
  const Layout layout = static_cast<Layout>(bytes.next(3));
  const int unused = 1 + bytes.next(5);
  c.x = make(c.shape, c.dtype);
  c.gq = make(c.shape, c.dtype);
  c.codebook = make({c.codes, c.dims}, c.codebook_dtype);
  c.w = make({c.n}, Dtype::f64);
  std::mt19937_64 random(static_cast<uint64_t>(bytes.next(256)));
  for (Tensor* t : {&c.x, &c.gq, &c.codebook, &c.w}) {
    fill(*t, random, -2, 2);
    if (bytes.next(3) == 0) random_values(*t, bytes);
  }
  for (int64_t i = 0; i < c.n; ++i) {
    c.indices.push_back(random() % unused == 0 ? -1 : static_cast<int64_t>(random() % c.codes));
  }

  cpu::set_isa(cpu::Isa::scalar);
  const Outputs plain = run(c, Layout::contiguous, serial);
  if (!c.fixed) check_sums(c, plain);
  const Dtype wide = c.dtype == Dtype::f64 ? c.dtype : compute(c.codebook_dtype);
  const Dtype dtypes[] = {c.dtype, wide, c.dtype, c.out, c.out};
  for (int isa = 0; isa <= static_cast<int>(cpu::best_isa()); ++isa) {
    cpu::set_isa(static_cast<cpu::Isa>(isa));
    const Outputs other = run(c, layout, backwards);
    for (size_t i = 0; i < plain.size(); ++i) {
      const bool integers = c.fixed && i >= 3;
      CHECK(integers ? other[i] == plain[i] : same(values(other[i], dtypes[i]), values(plain[i], dtypes[i])),
            "output %d of instruction set %d, layout %d", static_cast<int>(i), isa, static_cast<int>(layout));
    }
  }
  cpu::set_isa(cpu::best_isa());
}

}  // namespace vaeops::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  vaeops::test::check_vq({data, size});
  if (vaeops::test::failures > 0) std::abort();
  return 0;
}
