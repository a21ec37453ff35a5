// Every kernel launcher of vaeops. No torch here: raw pointers, sizes and strides; the stream (or the CPU's parallel
// loop) comes last.
//
// Letters: n elements of the call in logical (row-major) order, R batch rows, S noise streams, P elements of a prior;
// vector quantization: N rows, D dims, K codes.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;  // what a cudaStream_t points to

namespace vaeops {

enum class Dtype : int32_t { f32, bf16, f16, f64 };
enum class Param : int32_t { logvar, logstd, std };  // what rho and the prior's rho are
// Order of vaeops.ref.gaussian.REDUCTIONS; off: the KL is not wanted.
enum class Reduction : int32_t { off = -1, none, dim, sample, batchmean, mean, sum };

constexpr int kMaxDims = 8;

// The logical shape that all operands of a call share, adjacent dims merged where every operand allows it.
// The batch dims come first: R rows of `width` elements each.
struct Shape {
  int32_t ndim;
  int64_t size[kMaxDims];
  int64_t n;      // elements
  int64_t rows;   // R: product of the batch dims (1 when there are none)
  int64_t width;  // n / R: product of the other dims; what it says also holds where R is 0
};

// One tensor read or written through a Shape. Strides are in elements; 0 where the tensor is broadcast.
struct Operand {
  void* data = nullptr;  // null: the operand is absent
  Dtype dtype = Dtype::f32;
  bool bytes = false;   // uint8 or bool data, where a call takes such; `dtype` says nothing then
  bool linear = false;  // element i lies at data[i]
  int64_t stride[kMaxDims] = {};
};

// Noise of the call: S streams of n / S elements each, seed (key, offset) per stream.
struct Noise {
  const int64_t* seed = nullptr;  // [S, 2]; null: the noise is `eps`, or none is drawn
  int64_t streams = 0;            // S
};

// What both directions of the Gaussian step read. mu and rho share a dtype T; C is fp64 when T is, else fp32.
struct Gaussian {
  Shape shape;
  Operand mu, rho;              // T
  Operand prior_mu, prior_rho;  // any floating dtype, broadcast; absent: N(0, I)
  Operand eps;                  // any floating dtype; absent: drawn from `noise`, or no sample is wanted
  Noise noise;
  Param param = Param::logvar;
  bool clamped = false;
  double clamp_lo = 0, clamp_hi = 0;  // of rho
  double temperature = 1;
  Reduction reduction = Reduction::off;
};

struct GaussianForward : Gaussian {
  Operand z;  // T; absent: no sample
  void* kl;   // C, contiguous: [n], [n / R], [R] or [] by `reduction`; unused when off
};

struct GaussianBackward : Gaussian {
  Operand gz;                      // T; absent: no gradient reaches z
  Operand gkl;                     // C, in the reduced shape, broadcast; absent: no gradient reaches the KL
  Operand gmu, grho;               // T
  void *gprior_mu, *gprior_rho;    // C, contiguous [P], fully written; null: not wanted
  int64_t prior_stride[kMaxDims];  // of both, 0 where the prior is broadcast
  int64_t prior_n;                 // P
};

// log N(x; mu, sigma^2). x, mu, rho, gx, gmu, grho share T.
struct LogProb {
  Shape shape;
  Operand x, mu, rho;
  Param param = Param::logvar;
  Reduction reduction = Reduction::sample;
};

struct LogProbForward : LogProb {
  void* out;  // C, contiguous, by `reduction`
};

struct LogProbBackward : LogProb {
  Operand grad;  // C, in the reduced shape, broadcast
  Operand gx, gmu, grho;
};

// Orders of vaeops.ref.perceptual.DISTANCES and .ALGORITHMS.
enum class Distance : int32_t { mse, l1, smooth_l1, lpips, gram };
enum class VggAlgorithm : int32_t { winograd, direct, bf16 };

constexpr int kVggLayers = 24;  // VGG19: 16 convolutions and 5 pools
constexpr int kVggTaps = 2 * kVggLayers;
constexpr int kVggHeads = 64;

// Letters of the perceptual family: B images of H x W, maps of h x w, C channels in, K channels out.
// A frozen trunk, cut after its last tap: 3x3 convolutions (stride 1, padding 1) with bias and ReLU, and 2x2 max pools.
struct VggTrunk {
  int32_t layers = 0;
  int64_t channels[kVggLayers];  // K of a convolution; 0: a pool
  const float* packed;           // by vgg_pack: weights of both directions, biases
  int32_t taps = 0;
  int32_t tap[kVggTaps];  // ascending; 2 * layer: the convolution's output, 2 * layer + 1: the layer's output
  VggAlgorithm algorithm = VggAlgorithm::winograd;
};

// [B, 3, H, W] of any strides. (p - mean) * rstd enters the first convolution, whose padding is 0.
struct VggImage {
  const void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::f32;
  bool uint8 = false;  // instead of `dtype`
  int64_t stride[4];
  float mean[3], rstd[3];
};

struct VggFeatures {
  VggTrunk trunk;
  VggImage image;
  int64_t batch, height, width;
  void* map[kVggTaps];  // [B, h, w, K] fp32 (bf16: bf16), one a tap
  uint8_t* saved;       // vgg_saved_bytes: masks of the ReLUs, codes of the pools; null: not kept
};

struct VggFeaturesBackward {
  VggTrunk trunk;
  int64_t batch, height, width;
  const void* grad[kVggTaps];  // as the maps; null: no gradient reaches this tap
  const uint8_t* saved;
  float rstd[3];
  void* gx;  // [B, 3, H, W] contiguous
  Dtype gx_dtype;
};

// One term of the loss: weight * distance between the two images' maps at trunk.tap[tap].
struct VggHead {
  int32_t tap;
  Distance kind;
  float weight;
  const float* lin;  // [K]; lpips alone
};

// losses[i, b] = distance i of image b; gx = the gradient of sum_i weight_i * losses[i, b] with respect to image b.
struct PerceptualForward {
  VggTrunk trunk;
  VggImage image, target;            // target absent: target_map
  const void* target_map[kVggTaps];  // [B, h, w, K]
  Dtype target_map_dtype;            // fp32 or bf16
  int64_t batch, height, width;
  int32_t heads;
  VggHead head[kVggHeads];
  bool mean;      // else the sum over a map
  float* losses;  // [heads, B]
  void* gx;       // [B, 3, H, W] contiguous; null: not wanted
  Dtype gx_dtype;
};

// Distance between two maps [B, C, h, w] of any strides.
struct FeatureDistance {
  const void *a, *b;
  Dtype dtype;
  int64_t a_stride[4], b_stride[4];
  int64_t batch, channels, height, width;
  Distance kind;
  const void* lin;  // C (fp64 for fp64 maps, else fp32), [C]; lpips alone
  bool mean, spatial;
};

struct FeatureDistanceForward : FeatureDistance {
  void* out;  // C: [B], or [B, h, w] where spatial
};

struct FeatureDistanceBackward : FeatureDistance {
  const void* grad;  // C, as `out`
  void *ga, *gb;     // the maps' dtype, strides below; null: not wanted
  int64_t ga_stride[4], gb_stride[4];
};

// A trunk with a batch norm between each convolution and its ReLU, on the statistics of the batch: of the convolution's
// output y it makes (y - mean) rstd weight + bias, which is the tap before the ReLU. A pool follows a convolution. The
// arrays go by layer; those of a pool are not read.
struct VggBatchNorm {
  VggTrunk trunk;
  int64_t batch, height, width;
  const float *weight[kVggLayers], *bias[kVggLayers];  // [K]
  float* stats[kVggLayers];                            // [2, K]: mean, rstd = 1 / sqrt(variance + eps)
  void* kept[kVggLayers];  // [B, h, w, K] fp32 or less: y, in the elements of the kernels in use
};

struct VggBatchNormFeatures : VggBatchNorm {  // kept null: not kept
  VggImage image;
  double eps;
  float* map[kVggTaps];  // [B, h, w, K], one a tap
};

struct VggBatchNormBackward : VggBatchNorm {
  const float* grad[kVggTaps];  // as the maps; null: no gradient reaches this tap
  float rstd[3];                // of the image
  void* gx;                     // [B, 3, H, W] contiguous, fp32, bf16 or f16
  Dtype gx_dtype;
};

// Order of vaeops.ref.recon.ELEMENTWISE.
enum class ReconKind : int32_t {
  bce,
  bce_logits,
  mse,
  half_mse,
  l1,
  huber,
  gaussian_nll,
  laplace_nll,
  discretized_logistic
};

// The reconstruction loss of each element; formulas in vaeops/ref/recon.py.
struct Recon {
  Shape shape;
  Operand pred;       // T
  Operand target;     // any floating dtype, or bytes
  double levels = 1;  // a target of bytes is t / levels: 255 for an 8-bit image, 1 for bool
  Operand weight;     // any floating dtype, or bytes (a mask); absent: 1. Where it is 0 the element is not looked at
  ReconKind kind = ReconKind::mse;
  double scale = 1;
  Reduction reduction = Reduction::sample;
};

struct ReconForward : Recon {
  void* out;  // C, contiguous, by `reduction`
};

struct ReconBackward : Recon {
  Operand grad;   // C, in the reduced shape, broadcast
  Operand gpred;  // T
};

// (sum t) logsumexp(x) - sum t x of R rows of D items: shape.rows and shape.width.
struct Multinomial {
  Shape shape;
  Operand logits;  // T
  Operand target;  // counts: any floating dtype, or bytes
  Operand weight;  // any floating dtype: multiplies a count; bytes: a mask, which takes items out; absent: 1
};

struct MultinomialForward : Multinomial {
  void *nll, *total;  // C [R]
  double* lse;        // [R]: backward takes it from logits of its own size, which leaves little of its digits
};

struct MultinomialBackward : Multinomial {
  const void *grad, *total;  // C [R]
  const double* lse;         // [R]
  Operand glogits;           // T
};

// Orders of vaeops.ref.vq.METRICS, .REDUCTIONS (off: no loss) and .ESTIMATORS.
enum class Metric : int32_t { l2, cosine, dot };
enum class RowReduction : int32_t { off = -1, none, mean, sum };
enum class Estimator : int32_t { none, ste, rotation };

// N rows of D dims through any strides: element (n, d) lies at data[offset of n by operand.stride + d * step], where
// `shape` holds the row dims alone (shape.n = N, at least one dim).
struct Rows {
  Operand operand;
  int64_t step = 0;
};

// Indices are contiguous [N] in row-major order of the rows, int64 or int32; -1 marks a row that is not used.
struct Indices {
  void* data = nullptr;
  bool int32 = false;
};

// Nearest codes; the definition of "nearest" is in vaeops/ref/vq.py.
struct VqAssign {
  Shape shape;
  Rows x;                // any floating dtype
  const void* codebook;  // [K, D] contiguous
  Dtype codebook_dtype;
  const uint8_t* mask;  // [N]; null: every row is used
  int64_t dims, codes;  // D, K
  Metric metric;
  bool exact;               // false: the fast pass alone
  int64_t k = 0;            // 0: the nearest code; else the k nearest, ascending by (score, index)
  Indices indices;          // [N], or [N, k]
  void* scores = nullptr;   // [N, k]; null where k = 0
  bool scores_f64 = false;  // else fp32
};

// quantized = codebook[indices] and the loss (x - code)^2.
struct VqGather {
  Shape shape;
  Indices indices;
  const void* codebook;  // [K, D] contiguous
  Dtype codebook_dtype;
  Rows x;               // absent: no loss
  Rows quantized;       // x's dtype; the codebook's where x is absent
  int64_t dims, codes;  // D, K
  double fill;          // of rows with index -1
  RowReduction reduction = RowReduction::off;
  void* loss = nullptr;  // C (fp64 when x or the codebook is, else fp32): [N] or []
};

// gx = E(gq) + 2 w (x - code).
struct VqGatherBackward {
  Shape shape;
  Indices indices;
  const void* codebook;  // [K, D] contiguous
  Dtype codebook_dtype;
  Rows x, gq, gx;  // one dtype; gq absent: no gradient reaches `quantized`
  const void* w;   // C, [N] or []; null: no gradient reaches the loss
  bool w_per_row;
  int64_t dims, codes;  // D, K
  Estimator estimator;
};

// Sums of rows by index.
struct VqSegmentSum {
  Shape shape;
  Indices indices;
  Rows values;
  const void* weights;  // C, [N]; null: every row weighs 1
  bool weights_f64;
  const void* absmax;  // C, []; null: floating sums. Else fixed point: counts and sums are int64
  bool absmax_f64;
  int64_t dims, codes;  // D, K
  bool skip_nonfinite;  // rows with a NaN or Inf count nowhere
  bool out_f64;         // counts and sums, where they are floating
  void *counts, *sums;  // [K], [K, D] contiguous, fully written
};

// 1 / (what the reduction divides by); 1 for empty input, so that zero rows give a zero loss.
inline double reduction_scale(Reduction reduction, const Shape& shape) {
  const int64_t count = reduction == Reduction::dim || reduction == Reduction::batchmean ? shape.rows
                        : reduction == Reduction::mean                                   ? shape.n
                                                                                         : 1;
  return 1.0 / static_cast<double>(count > 0 ? count : 1);
}

// Runs body(context, begin, end) over disjoint ranges that cover [0, n), on any number of threads, and returns when all
// are done.
using ParallelFor = void (*)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);

namespace cpu {

void gaussian_forward(const GaussianForward& call, ParallelFor parallel);
void gaussian_backward(const GaussianBackward& call, ParallelFor parallel);
void log_prob_forward(const LogProbForward& call, ParallelFor parallel);
void log_prob_backward(const LogProbBackward& call, ParallelFor parallel);
void recon_forward(const ReconForward& call, ParallelFor parallel);
void recon_backward(const ReconBackward& call, ParallelFor parallel);
void multinomial_forward(const MultinomialForward& call, ParallelFor parallel);
void multinomial_backward(const MultinomialBackward& call, ParallelFor parallel);
void normal(float* out /* [S, n / S] */, int64_t n, Noise noise, ParallelFor parallel);
// child[i] = fold_in(seed[i or 0], index[i or 0]); see vaeops/ref/rng.py
void fold_in(const int64_t* seed /* [M or 1, 2] */, int64_t seed_stride, const int64_t* index /* [M or 1] */,
             int64_t index_stride, int64_t* child /* [M, 2] */, int64_t m);

void vq_assign(const VqAssign& call, ParallelFor parallel);
void vq_gather(const VqGather& call, ParallelFor parallel);
void vq_gather_backward(const VqGatherBackward& call, ParallelFor parallel);
void vq_segment_sum(const VqSegmentSum& call, ParallelFor parallel);

// Weights [w0, b0, w1, b1, ...] of the convolutions (OIHW fp32) in the order that the kernels of this machine read,
// behind a header that says how they were packed. The first layer takes images of three channels.
int64_t vgg_packed_floats(const VggTrunk& trunk);
void vgg_pack(const VggTrunk& trunk, const float* const* weights, float* packed, ParallelFor parallel);
// Why `trunk.packed`, which has so many floats, is not what vgg_pack makes of this trunk, or of one that goes on, on
// this machine; null: it is.
const char* vgg_packed_mismatch(const VggTrunk& trunk, int64_t floats);
int64_t vgg_saved_bytes(const VggTrunk& trunk, int64_t batch, int64_t height, int64_t width);
void vgg_features(const VggFeatures& call, ParallelFor parallel);
void vgg_features_backward(const VggFeaturesBackward& call, ParallelFor parallel);
void perceptual_forward(const PerceptualForward& call, ParallelFor parallel);
void feature_distance_forward(const FeatureDistanceForward& call, ParallelFor parallel);
void feature_distance_backward(const FeatureDistanceBackward& call, ParallelFor parallel);
void vgg_batchnorm_features(const VggBatchNormFeatures& call, ParallelFor parallel);
void vgg_batchnorm_backward(const VggBatchNormBackward& call, ParallelFor parallel);

// Instruction set: the best that the machine has, unless a test asked for a lesser one.
// amx: AVX-512, and tile products where a kernel has them.
enum class Isa : int32_t { scalar, avx2, avx512, amx };
Isa best_isa();
Isa isa();
bool set_isa(Isa wanted);  // false when the machine lacks it

// Memory for large outputs, kept for reuse when it is given back (cpu/pages.cpp). Null where the system
// offers none: then the caller allocates as usual.
constexpr size_t kLargeOutput = size_t{128} << 10;
void* take_pages(size_t bytes);
void give_pages(void* data, size_t bytes);
// Returns what is kept to the system; how many bytes that was.
size_t release_pages();

}  // namespace cpu

// The tensors of a call, its scratch memory and its stream belong to the current device. Launchers return a cudaError_t
// (0: launched) and never synchronise, so they can be captured in a CUDA graph. Nothing is launched for empty outputs;
// a reduction over no elements writes zeros, except `dim` over zero rows, whose length the call does not tell: the
// caller zero-fills that one.
namespace cuda {

constexpr int64_t kTickets = 1024;

struct Scratch {
  void* partials = nullptr;     // as many bytes as the launcher's `*_scratch` says, 16-byte aligned, not initialised
  uint32_t* tickets = nullptr;  // [kTickets], zero before the first call; every launch leaves them zero. One array per
                                // stream: calls that may run at the same time must not share it
};

// Bytes of Scratch::partials; 0 for most calls. Asked with the current device the one that will run the call.
int64_t gaussian_forward_scratch(const GaussianForward& call);
int64_t gaussian_backward_scratch(const GaussianBackward& call);
int64_t log_prob_forward_scratch(const LogProbForward& call);
int64_t recon_forward_scratch(const ReconForward& call);
int64_t multinomial_forward_scratch(const MultinomialForward& call);
int64_t vq_assign_scratch(const VqAssign& call);
int64_t vq_gather_scratch(const VqGather& call);
int64_t vq_gather_backward_scratch(const VqGatherBackward& call);
int64_t vq_segment_sum_scratch(const VqSegmentSum& call);

int gaussian_forward(const GaussianForward& call, Scratch scratch, CUstream_st* stream);
int gaussian_backward(const GaussianBackward& call, Scratch scratch, CUstream_st* stream);
int log_prob_forward(const LogProbForward& call, Scratch scratch, CUstream_st* stream);
int log_prob_backward(const LogProbBackward& call, CUstream_st* stream);
int recon_forward(const ReconForward& call, Scratch scratch, CUstream_st* stream);
int recon_backward(const ReconBackward& call, CUstream_st* stream);
// Of operands that are seen as [R, D] and no finer.
int multinomial_forward(const MultinomialForward& call, Scratch scratch, CUstream_st* stream);
int multinomial_backward(const MultinomialBackward& call, CUstream_st* stream);
int normal(float* out /* [S, n / S] */, int64_t n, Noise noise, CUstream_st* stream);
int fold_in(const int64_t* seed /* [M or 1, 2] */, int64_t seed_stride, const int64_t* index /* [M or 1] */,
            int64_t index_stride, int64_t* child /* [M, 2] */, int64_t m, CUstream_st* stream);
int vq_assign(const VqAssign& call, Scratch scratch, CUstream_st* stream);
int vq_gather(const VqGather& call, Scratch scratch, CUstream_st* stream);
int vq_gather_backward(const VqGatherBackward& call, Scratch scratch, CUstream_st* stream);
int vq_segment_sum(const VqSegmentSum& call, Scratch scratch, CUstream_st* stream);
const char* error_string(int error);

}  // namespace cuda
}  // namespace vaeops
