#include "kernels/search_ops.h"

#include <math.h>
#include <string.h>

#include "kernels/scheme_codec.h"

#define JOIN_(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_(name, isa)
#define NAME(name) JOIN(name, ISA)

/* Half of the lanes as one value: gcc 12 does not keep an array of sums in registers. */
typedef float half_lanes __attribute__((vector_size(32), aligned(4), may_alias));

#define ISA c
#include "kernels/search_ops.inc"
#undef ISA

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,bmi2,f16c")
#define ISA avx2
#include "kernels/search_ops.inc"
#undef ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512")
#define ISA avx512
#include "kernels/search_ops.inc"
#undef ISA
#pragma GCC pop_options

static const mq_search_ops *const tables[MQ_ISA_COUNT] = {&search_c, &search_avx2, &search_avx512};
#else
static const mq_search_ops *const tables[MQ_ISA_COUNT] = {&search_c, &search_c, &search_c};
#endif

const mq_search_ops *mq_search_ops_of(mq_isa isa)
{
    return tables[isa];
}

const mq_search_ops *mq_search_ops_get(void)
{
    return tables[mq_cpu_isa()];
}
