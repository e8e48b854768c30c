#include "kernels/kernels.h"

extern const mq_kernels mq_kernels_c;
#if defined(__x86_64__)
extern const mq_kernels mq_kernels_avx2, mq_kernels_avx512;
#endif

static const mq_kernels *const tables[MQ_ISA_COUNT] = {
    [MQ_ISA_C] = &mq_kernels_c,
#if defined(__x86_64__)
    [MQ_ISA_AVX2] = &mq_kernels_avx2,
    [MQ_ISA_AVX512] = &mq_kernels_avx512,
#endif
};

const mq_kernels *mq_kernels_of(mq_isa isa)
{
    return tables[isa];
}

const mq_kernels *mq_kernels_get(void)
{
    const mq_kernels *table = tables[mq_cpu_isa()];
    return table != NULL ? table : &mq_kernels_c;
}
