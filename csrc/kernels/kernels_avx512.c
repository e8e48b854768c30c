/* The kernels for AVX-512 F, BW, CD, DQ, VL. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "format/format.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")

#define MQ_KERNELS_ISA MQ_ISA_AVX512
#include "kernels/kernels.inc"
#include "kernels/kernels_bf16.inc"

/* Later entries override the generic ones. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
const mq_kernels mq_kernels_avx512 = {
    MQ_KERNELS_GENERIC,
#include "kernels/kernels_lists.inc"
    MQ_KERNELS_BF16,
};
#pragma GCC diagnostic pop

#pragma GCC pop_options
#else
typedef int mq_no_avx512;
#endif
