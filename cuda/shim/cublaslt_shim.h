/* A cuBLASLt that computes on the CPU, in double: the calls of cublaslt.def under their own names, so that a library
 * that holds them is opened like the real one. It refuses what cuBLAS's documentation says is refused
 * ("cublasLtMatmul()", "Narrow Precision Data Types Usage"), an algorithm that was chosen for another product or
 * alignment, and workspaces that are too small; it fills the workspace it is given with rubbish. It knows nothing of
 * what is fast. */
#ifndef MODELQ_CUBLASLT_SHIM_H
#define MODELQ_CUBLASLT_SHIM_H

#include "cuda_shim.h"

#pragma GCC visibility push(default)
extern "C" {
void mq_shim_lt_set_capability(int capability);     /* of the device it is to be for: 10 * major + minor; 90 at first */
void mq_shim_lt_set_version(int version);           /* 130100 at first */
/* The n-th call of that name from now (1 = the next) gives that status; 0 = none does. */
void mq_shim_lt_fail(const char *call, int n, int status);
int64_t mq_shim_lt_calls(const char *call);         /* how many there were */
int64_t mq_shim_lt_live(void);                      /* handles, descriptors, ... that were not destroyed yet */
const char *mq_shim_lt_reason(void);                /* of the last refusal */
/* Every descriptor is made by the real library at that path too, and every attribute set there, which needs no GPU.
 * What it says otherwise than this one is CUBLAS_STATUS_INTERNAL_ERROR. 0, or -1: not opened. */
int mq_shim_lt_mirror(const char *path);
}
#pragma GCC visibility pop

#endif
