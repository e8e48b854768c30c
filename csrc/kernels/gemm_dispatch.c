/* Which micro-kernel serves which kind of product: the first of this table that the processor has and runs well. */
#include "kernels/gemm_kernel.h"

#include <stdatomic.h>
#include <string.h>

#include "core/cpu.h"

/* Best first. A kernel of pairs serves MQ_GEMM_BF16 only; one of float32 serves both. */
static const mq_gemm_kernel *const kernels[] = {
#if defined(__x86_64__)
    &mq_gemm_kernel_amx, &mq_gemm_kernel_avx512_bf16, &mq_gemm_kernel_avx512, &mq_gemm_kernel_avx2,
#endif
    &mq_gemm_kernel_c,
};

static _Atomic(const mq_gemm_kernel *) selected[2];

static int serves(const mq_gemm_kernel *kernel, mq_gemm_kind kind)
{
    if (kind == MQ_GEMM_F32 && kernel->unit != MQ_UNIT_F32) return 0;
    return (mq_cpu_features() & kernel->needs) == kernel->needs;
}

/* Intel's cores start one 512-bit vdpbf16ps in two cycles (measured on Sapphire Rapids: 118 GFLOP/s, where AVX-512 does
 * 195 on float32), AMD's since Zen 4 one or two a cycle. Without AMX, Intel is better off with rounded float32. */
static int is_slow(const mq_gemm_kernel *kernel)
{
#if defined(__x86_64__)
    return kernel == &mq_gemm_kernel_avx512_bf16 && __builtin_cpu_is("intel");
#else
    (void)kernel;
    return 0;
#endif
}

static const mq_gemm_kernel *find(mq_gemm_kind kind, const char *name)
{
    for (size_t i = 0; i < MQ_COUNT(kernels); i++) {
        if (!serves(kernels[i], kind)) continue;
        if (name == NULL ? !is_slow(kernels[i]) : strcmp(name, kernels[i]->name) == 0) return kernels[i];
    }
    return NULL;
}

const mq_gemm_kernel *mq_gemm_kernel_of(mq_gemm_kind kind)
{
    const mq_gemm_kernel *kernel = atomic_load_explicit(&selected[kind], memory_order_relaxed);
    if (kernel != NULL) return kernel;
    kernel = find(kind, NULL);
    atomic_store_explicit(&selected[kind], kernel, memory_order_relaxed);
    return kernel;
}

const char *mq_gemm_kernel_name(mq_gemm_kind kind)
{
    return mq_gemm_kernel_of(kind)->name;
}

int mq_gemm_force_kernel(mq_gemm_kind kind, const char *name)
{
    const mq_gemm_kernel *kernel = find(kind, name);
    if (kernel == NULL) return MQ_ERR_VALUE;
    atomic_store_explicit(&selected[kind], kernel, memory_order_relaxed);
    return MQ_OK;
}
