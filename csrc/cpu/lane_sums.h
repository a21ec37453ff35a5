// Sums in lanes, for one instruction set. No include guard: see foreach_isa.h.

// Sums of up to kTile elements gather in `lanes`, and their sums in `totals`: in one long chain of additions equal
// elements, such as those of a collapsed posterior, would all round the same way.
struct LaneSums {
  alignas(64) float totals[kLanes];
  bool empty = true;

  void start(const float* sums) {
    if (sums == nullptr) return;
    copy(sums, totals, kLanes);
    empty = false;
  }

  // The lanes start again at zero.
  VAEOPS_INLINE_METHOD void add(F (&lanes)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      float* const total = totals + v * kWidth;
      store(total, empty ? lanes[v] : load(total) + lanes[v]);
      lanes[v] = set1(0.0f);
    }
    empty = false;
  }

  float take() {
    empty = true;
    return static_cast<float>(sum_lanes(totals));
  }
};
