// Sums in lanes, for one instruction set. No include guard: see foreach_isa.h.

// totals += lanes, which start again at zero: every kTile elements, since in one long chain of additions equal
// elements, such as those of a collapsed posterior, would all round the same way.
VAEOPS_INLINE void add_to(float (&totals)[kLanes], F (&lanes)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    store(totals + v * kWidth, load(totals + v * kWidth) + lanes[v]);
    lanes[v] = set1(0.0f);
  }
}
