#include "kernels/softmax.h"

#include <math.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(4 * MQ_SOFTMAX_LANES)));
typedef int32_t bits __attribute__((vector_size(4 * MQ_SOFTMAX_LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * MQ_SOFTMAX_LANES)));

#define load(source) (*(const loose *)(source))
typedef float loose __attribute__((vector_size(4 * MQ_SOFTMAX_LANES), aligned(4), may_alias));

#define SUFFIX c
#include "kernels/softmax.inc"
#undef SUFFIX

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SUFFIX avx2
#include "kernels/softmax.inc"
#undef SUFFIX
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define SUFFIX avx512
#include "kernels/softmax.inc"
#undef SUFFIX
#pragma GCC pop_options
#else
#define table_avx2 table_c
#define table_avx512 table_c
#endif

const mq_softmax_kernels *mq_softmax_table_of(mq_isa isa)
{
    static const mq_softmax_kernels *const tables[MQ_ISA_COUNT] = {&table_c, &table_avx2, &table_avx512};
    return tables[isa];
}

const mq_softmax_kernels *mq_softmax_table(void)
{
    return mq_softmax_table_of(mq_cpu_isa());
}
