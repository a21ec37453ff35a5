// The trunk's convolutions for one instruction set. No include guard: see foreach_isa.h.
#include "cpu/vgg_epilogue_kernels.h"
//
#include "cpu/vgg_winograd_kernels.h"
//
#include "cpu/vgg_direct_kernels.h"
