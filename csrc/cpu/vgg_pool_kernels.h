// Max pools and gradients between convolutions, a row of pixels at a time, for one instruction set. No include guard:
// see foreach_isa.h.

constexpr int kWordParts = 16 / kWidth;  // vectors to a mask word

VAEOPS_INLINE Mask mask_of(uint32_t word, int part) {
#if VAEOPS_ISA == 2
  static_cast<void>(part);
  return static_cast<Mask>(word);
#elif VAEOPS_ISA == 1
  const I each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return floats(_mm256_cmpeq_epi32(iand(iset1(word >> (8 * part)), each), each));
#else
  return (word >> part & 1) != 0;
#endif
}
VAEOPS_INLINE uint32_t word_of(Mask mask, int part) {
#if VAEOPS_ISA == 2
  static_cast<void>(part);
  return mask;
#elif VAEOPS_ISA == 1
  return static_cast<uint32_t>(_mm256_movemask_ps(mask)) << (8 * part);
#else
  return static_cast<uint32_t>(mask) << part;
#endif
}

template <class T>
static void pool_row(const PoolRow& row) {
  const int64_t channels = row.channels;
  for (int64_t p = 0; p < row.width / 2; ++p) {
    const T* const top = static_cast<const T*>(row.x) + 2 * p * channels;
    const T* const bottom = top + row.width * channels;
    T* const y = static_cast<T*>(row.y) + p * channels;
    for (int64_t c = 0; c < channels; c += 16) {
      uint32_t lower = 0, right = 0;
#pragma GCC unroll 2
      for (int part = 0; part < kWordParts; ++part) {
        const int64_t at = c + part * kWidth;
        const F a = load(top + at), b = load(top + channels + at);
        const F d = load(bottom + at), e = load(bottom + channels + at);
        const Mask right0 = above(b, a), right1 = above(e, d);
        const F upper = select(right0, b, a), under = select(right1, e, d);
        const Mask take = above(under, upper);
        const uint32_t low = word_of(take, part);
        lower |= low;
        right |= (low & word_of(right1, part)) | (~low & word_of(right0, part));
        store(y + at, select(take, under, upper));
      }
      if (row.code == nullptr) continue;
      uint16_t* const code = row.code + (p * channels + c) / 8;
      code[0] = static_cast<uint16_t>(lower);
      code[1] = static_cast<uint16_t>(right);
    }
  }
}

template <class T>
static void spread_row(const SpreadRow& row) {
  const int64_t channels = row.channels;
  const F zero = set1(0.0f);
  for (int64_t x = 0; x < row.width; ++x) {
    const int64_t p = x / 2;
    const bool covered = p < row.pooled;
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t word = (x * channels + c) / 16;
      uint32_t here = 0;
      if (covered) {
        const uint16_t* const code = row.code + (p * channels + c) / 8;
        here = (row.parity != 0 ? code[0] : ~code[0]) & (x % 2 != 0 ? code[1] : ~code[1]);
      }
      const uint32_t pass = row.mask != nullptr ? row.mask[word] : 0xFFFFu;
#pragma GCC unroll 2
      for (int part = 0; part < kWordParts; ++part) {
        const int64_t at = x * channels + c + part * kWidth;
        F g = zero;
        if (covered)
          g = select(mask_of(here, part), load(static_cast<const T*>(row.g) + at - (x - p) * channels), zero);
        if (row.after != nullptr) g = g + load(static_cast<const T*>(row.after) + at);
        if (row.mask != nullptr) g = select(mask_of(pass, part), g, zero);
        if (row.before != nullptr) g = g + load(static_cast<const T*>(row.before) + at);
        store(static_cast<T*>(row.gx) + at, g);
      }
    }
  }
}
