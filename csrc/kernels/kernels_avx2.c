/* The kernels for AVX2 with FMA. */
#if defined(__x86_64__)
#include "format/format.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

#define MQ_KERNELS_ISA MQ_ISA_AVX2
#include "kernels/kernels.inc"

const mq_kernels mq_kernels_avx2 = {
    MQ_KERNELS_GENERIC,
#include "kernels/kernels_lists.inc"
};

#pragma GCC pop_options
#else
typedef int mq_no_avx2;
#endif
