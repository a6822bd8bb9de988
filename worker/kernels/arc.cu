// All kernels as one translation unit: what build.py compiles for GPUs, and the emulator's tests for the CPU.
#include "sketch.cu"

#include "gaussian.cu"

#include "gather.cu"

#include "commit.cu"

#include "energy.cu"

#include "adamw.cu"
