// Nothing but a module for the import system: loading this library registers its kernels with torch.
#include <Python.h>

#if defined(VAEOPS_CUDA)
#define VAEOPS_MODULE "_ops_cuda"
#define VAEOPS_INIT PyInit__ops_cuda
#else
#define VAEOPS_MODULE "_ops_cpu"
#define VAEOPS_INIT PyInit__ops_cpu
#endif

extern "C" __attribute__((visibility("default"))) PyObject* VAEOPS_INIT(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, VAEOPS_MODULE, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
