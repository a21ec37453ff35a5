// `vaeops._host`: what Python asks of the machine and of the build. Torch-free, and optional: without it every kernel
// runs all the same, on the best instruction set.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

const char* const kIsaNames[] = {"scalar", "avx2", "avx512", "amx"};

// A function of the operator library that torch has already loaded.
template <class Function>
Function* loaded(const std::string& library, const char* name) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) throw std::runtime_error("vaeops: " + library + " is not loaded");
  void* symbol = dlsym(handle, name);
  dlclose(handle);
  if (symbol == nullptr) throw std::runtime_error(std::string("vaeops: no ") + name + " in " + library);
  return reinterpret_cast<Function*>(symbol);
}

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
          {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0}};
#else
  return {};
#endif
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__},
#if defined(__SANITIZE_ADDRESS__)
          {"sanitizer", "address"},
#endif
#if defined(__x86_64__)
          {"machine", "x86_64"}};
#elif defined(__aarch64__)
          {"machine", "aarch64"}};
#else
          {"machine", "other"}};
#endif
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What the machine offers and how the native parts were built.";
  m.def("cpu_features", &cpu_features, "CPU features that matter to the kernels, by name");
  m.def("build_info", &build_info, "compiler and machine of the build");
  m.def(
      "isa", [](const std::string& library) { return kIsaNames[loaded<int32_t()>(library, "vaeops_isa")()]; },
      py::arg("library"), "instruction set that the CPU kernels in `library` use");
  m.def(
      "isas",
      [](const std::string& library) {
        const int32_t best = loaded<int32_t()>(library, "vaeops_best_isa")();
        return std::vector<std::string>(kIsaNames, kIsaNames + best + 1);
      },
      py::arg("library"), "instruction sets that this machine can run, least first");
  m.def(
      "set_isa",
      [](const std::string& library, const std::string& name) {
        for (int32_t i = 0; i < 4; ++i) {
          if (name != kIsaNames[i]) continue;
          if (loaded<int32_t(int32_t)>(library, "vaeops_set_isa")(i) == 1) return;
          throw std::invalid_argument("set_isa: this machine has no " + name);
        }
        throw std::invalid_argument("set_isa: name must be scalar, avx2, avx512 or amx, got " + name);
      },
      py::arg("library"), py::arg("name"), "makes the CPU kernels use a lesser instruction set (for tests)");
}
