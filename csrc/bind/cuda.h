// How a binding runs a call on CUDA tensors: on the tensors' device and its current stream, without synchronising.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <utility>

#include "bind/common.h"

namespace vaeops::bind {

#define VAEOPS_DEVICE CUDA
#define VAEOPS_OVERLOAD ".cuda"

inline void succeed(int error) { STD_TORCH_CHECK(error == 0, "vaeops: CUDA: ", cuda::error_string(error)); }

// Zeroed tickets of one stream of the current device, which every launch leaves zeroed. Not torch's memory: the caller
// may be allocating from a pool that ends with the call, as when torch.compile warms up a CUDA graph. Never freed: a
// static destructor would run after CUDA's.
inline uint32_t* stream_tickets(int32_t device, cudaStream_t stream) {
  static auto& cache = *new std::map<std::pair<int32_t, cudaStream_t>, void*>;
  static auto& mutex = *new std::mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  void*& tickets = cache[{device, stream}];
  if (tickets == nullptr) {
    constexpr size_t kBytes = cuda::kTickets * sizeof(uint32_t);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // other threads may be capturing
    succeed(cudaThreadExchangeStreamCaptureMode(&mode));
    void* fresh = nullptr;
    int error = cudaMalloc(&fresh, kBytes);
    if (error == 0) error = cudaMemsetAsync(fresh, 0, kBytes, stream);
    succeed(cudaThreadExchangeStreamCaptureMode(&mode));
    succeed(error);
    tickets = fresh;
  }
  return static_cast<uint32_t*>(tickets);
}

class Device {
 public:
  explicit Device(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  static void check(const Tensor& x, const char* name) { STD_TORCH_CHECK(x.is_cuda(), name, " must be a CUDA tensor"); }

  static Tensor fresh_like(const Tensor& x) { return uninitialized_like(x); }
  static Tensor fresh(const Tensor& like, const int64_t* sizes, int64_t rank, ScalarType dtype) {
    return empty(like, sizes, rank, dtype);
  }
  static Tensor fresh_floats(const Tensor& like, int64_t n) {
    const int64_t size[1] = {n};
    return empty(like, size, 1, ScalarType::Float);
  }

  static void check_range(const Indices&, int64_t, int64_t) {}  // would cost a synchronisation

  void run(const GaussianForward& call) const {
    launch(cuda::gaussian_forward_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::gaussian_forward(call, scratch, stream_); });
  }
  void run(const GaussianBackward& call) const {
    launch(cuda::gaussian_backward_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::gaussian_backward(call, scratch, stream_); });
  }
  void run(const LogProbForward& call) const {
    launch(cuda::log_prob_forward_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::log_prob_forward(call, scratch, stream_); });
  }
  void run(const LogProbBackward& call) const { succeed(cuda::log_prob_backward(call, stream_)); }
  void run(const ReconForward& call) const {
    launch(cuda::recon_forward_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::recon_forward(call, scratch, stream_); });
  }
  void run(const ReconBackward& call) const { succeed(cuda::recon_backward(call, stream_)); }
  void run(const MultinomialForward& call) const {
    launch(cuda::multinomial_forward_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::multinomial_forward(call, scratch, stream_); });
  }
  void run(const MultinomialBackward& call) const { succeed(cuda::multinomial_backward(call, stream_)); }
  void run(const VqAssign& call) const {
    launch(cuda::vq_assign_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::vq_assign(call, scratch, stream_); });
  }
  void run(const VqGather& call) const {
    launch(cuda::vq_gather_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::vq_gather(call, scratch, stream_); });
  }
  void run(const VqGatherBackward& call) const {
    launch(cuda::vq_gather_backward_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::vq_gather_backward(call, scratch, stream_); });
  }
  void run(const VqSegmentSum& call) const {
    launch(cuda::vq_segment_sum_scratch(call),
           [&](cuda::Scratch scratch) { return cuda::vq_segment_sum(call, scratch, stream_); });
  }
  void normal(float* out, int64_t n, Noise noise) const { succeed(cuda::normal(out, n, noise, stream_)); }
  void fold_in(const int64_t* seed, int64_t seed_stride, const int64_t* index, int64_t index_stride, int64_t* child,
               int64_t m) const {
    succeed(cuda::fold_in(seed, seed_stride, index, index_stride, child, m, stream_));
  }

 private:
  template <class Launch>
  void launch(int64_t bytes, Launch&& run) const {
    if (bytes == 0) return succeed(run(cuda::Scratch{}));
    const int64_t words[1] = {(bytes + 7) / 8};
    const Tensor partials = empty(like_, words, 1, ScalarType::Long);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    succeed(cudaStreamIsCapturing(stream_, &status));
    if (status == cudaStreamCaptureStatusNone) {
      uint32_t* tickets = stream_tickets(like_.get_device_index(), stream_);
      return succeed(run(cuda::Scratch{partials.mutable_data_ptr(), tickets}));
    }
    // A graph may be replayed on any stream, beside eager work on the one it was captured on: tickets of its own.
    const int64_t size[1] = {cuda::kTickets};
    const Tensor tickets = torch::stable::new_zeros(like_, IntHeaderOnlyArrayRef(size, 1), ScalarType::Int);
    succeed(run(cuda::Scratch{partials.mutable_data_ptr(), static_cast<uint32_t*>(tickets.mutable_data_ptr())}));
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace vaeops::bind
