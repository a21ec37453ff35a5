// The reconstruction losses in C++ and, on the CPU, in CUDA: any bytes are a valid call with any values. Each
// instruction set, layout and order of tasks gives the same bits, in CUDA each order of threads, and numbers of an
// ordinary size give what the formulas say.
#include <cstdlib>

#include "run_recon.h"

namespace vaeops::test {
namespace {

struct Bytes {
  const uint8_t* data;
  size_t size;
  int next(int choices) {
    if (size == 0) return 0;
    --size;
    return *data++ % choices;
  }
};

Given given(Bytes& bytes, size_t rank) {
  Given g;
  g.bytes = bytes.next(3) == 0;
  g.dtype = static_cast<Dtype>(bytes.next(4));
  if (bytes.next(3) != 0) return g;
  for (size_t d = 0; d < rank; ++d) g.kept.push_back(bytes.next(2) != 0);
  return g;
}

void check(Bytes bytes) {
  constexpr double kScales[] = {0.3, 1, 0.02, 100};
  ReconCase c;
  const int rank = 1 + bytes.next(4);
  for (int d = 0; d < rank; ++d) c.shape.push_back(bytes.next(d == rank - 1 ? 150 : 5));
  if (rank < 3 && bytes.next(4) == 0) c.shape.back() *= 100;
  c.batch_ndim = bytes.next(rank + 1);
  c.dtype = static_cast<Dtype>(bytes.next(4));
  c.kind = bytes.next(kKinds);
  c.reduction = static_cast<Reduction>(bytes.next(6));
  c.scale = kScales[bytes.next(4)];
  c.target = given(bytes, c.shape.size());
  c.levels = bytes.next(2) != 0 ? 255 : 1;
  c.weight = given(bytes, c.shape.size());
  c.weight.present = bytes.next(2) != 0;
  const Layout layout = static_cast<Layout>(bytes.next(3));
  const unsigned seed = static_cast<unsigned>(bytes.next(256));
  const bool hidden = bytes.next(2) != 0, wild = bytes.next(2) != 0;

  const auto problem = [&](Layout l) {
    ReconCase with = c;
    with.layout = l;
    ReconProblem p(with, seed);
    Bytes values = bytes;
    for (Tensor* t : {&p.pred, &p.target, &p.weight, &p.grad}) {
      if (!wild || !t->present() || t->bytes) continue;
      for (int64_t i = 0; i < p.n && values.size > 0; ++i) {
        char* const at = t->data() + p.at(*t, i) * t->item();
        for (int64_t k = 0; k < t->item(); ++k) at[k] = static_cast<char>(values.next(256));
      }
    }
    if (hidden) p.hide();
    return p;
  };
  const ReconProblem plain = problem(Layout::contiguous), other = problem(layout);
  cpu::set_isa(cpu::Isa::scalar);
  const ReconResults first = run(plain, serially);
  constexpr double kSlack = 8;  // a fuzzer finds numbers whose roundings all go one way
  if (!wild) check_values(plain, first, c.name(), kSlack);
  const std::vector<double> bits = first.values(plain);
  for_each_isa([&](const std::string& isa) {
    CHECK(same(run(other, backwards).values(other), bits), "%s, layout %d: %s", isa.c_str(), static_cast<int>(layout),
          c.name().c_str());
  });
  if (c.multinomial() && (rank != 2 || c.batch_ndim != 1)) return;  // CUDA's is of [R, D]
  if (c.reduction == Reduction::dim && plain.n == 0) return;        // written by the caller
  cuda_host::options.multiprocessors = 1 + static_cast<int>(seed % 8);
  if (wild) {
    check_orders(other, run_cuda(other).values(other), 1);
  } else {
    check_cuda(other, 1, kSlack);
  }
}

}  // namespace
}  // namespace vaeops::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  vaeops::test::check({data, size});
  if (vaeops::test::failures > 0) std::abort();
  return 0;
}
