/* What the processor can do, asked once. MODELQ_ISA=c|avx2|avx512 caps it, for tests and for comparison. */
#ifndef MQ_CPU_H
#define MQ_CPU_H

#include "core/mq.h"

typedef enum mq_isa { MQ_ISA_C, MQ_ISA_AVX2, MQ_ISA_AVX512, MQ_ISA_COUNT } mq_isa;

enum {
    MQ_CPU_AVX2 = 1 << 0,        /* avx2, fma, f16c, bmi2 */
    MQ_CPU_AVX512 = 1 << 1,      /* avx512 f, bw, cd, dq, vl */
    MQ_CPU_AVX512_VBMI = 1 << 2, /* vpermb and friends */
    MQ_CPU_AVX512_BF16 = 1 << 3, /* vdpbf16ps */
    MQ_CPU_AVX512_VNNI = 1 << 4, /* vpdpbusd */
    MQ_CPU_AMX_BF16 = 1 << 5,    /* tdpbf16ps, and the kernel lets this process use tiles */
    MQ_CPU_AMX_INT8 = 1 << 6
};

unsigned mq_cpu_features(void);        /* detected and allowed by MODELQ_ISA */
mq_isa mq_cpu_isa(void);               /* the best kernel table that the features allow */
const char *mq_isa_name(mq_isa isa);   /* "c", "avx2", "avx512" */
int mq_isa_supported(mq_isa isa);      /* by the processor, whatever MODELQ_ISA says */
/* NULL, or why MODELQ_ISA cannot be honoured (unknown name, or not supported here). */
const char *mq_cpu_isa_problem(void);
size_t mq_cpu_feature_names(char *out, size_t size); /* "avx2 avx512 ...", for cpu_info() */

#endif
