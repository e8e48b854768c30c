#define _GNU_SOURCE
#include "core/cpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static struct {
    unsigned detected, allowed;
    mq_isa isa;
    const char *problem;
} cpu;
static pthread_once_t cpu_once = PTHREAD_ONCE_INIT;

static const char *const isa_names[MQ_ISA_COUNT] = {"c", "avx2", "avx512"};

/* What each table needs, and what a cap to that table still allows. */
static const unsigned isa_needs[MQ_ISA_COUNT] = {0, MQ_CPU_AVX2, MQ_CPU_AVX2 | MQ_CPU_AVX512};
static const unsigned isa_allows[MQ_ISA_COUNT] = {0, MQ_CPU_AVX2, ~0u};

static const struct { unsigned flag; const char *name; } feature_names[] = {
    {MQ_CPU_AVX2, "avx2"}, {MQ_CPU_AVX512, "avx512"}, {MQ_CPU_AVX512_VBMI, "avx512_vbmi"},
    {MQ_CPU_AVX512_BF16, "avx512_bf16"}, {MQ_CPU_AVX512_VNNI, "avx512_vnni"},
    {MQ_CPU_AMX_BF16, "amx_bf16"}, {MQ_CPU_AMX_INT8, "amx_int8"},
};

#if defined(__x86_64__)
/* Linux gives tile registers only to a process that asks (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA = 18). */
static int request_amx_permission(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

static unsigned detect_amx(void)
{
    unsigned a, b, c, d, flags = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d & (1u << 24)) || !request_amx_permission()) return 0;
    if (d & (1u << 22)) flags |= MQ_CPU_AMX_BF16;
    if (d & (1u << 25)) flags |= MQ_CPU_AMX_INT8;
    return flags;
}

static unsigned detect(void)
{
    unsigned flags = 0;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        flags |= MQ_CPU_AVX2;
    if (!(flags & MQ_CPU_AVX2) || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return flags;
    flags |= MQ_CPU_AVX512;
    if (__builtin_cpu_supports("avx512vbmi")) flags |= MQ_CPU_AVX512_VBMI;
    if (__builtin_cpu_supports("avx512vnni")) flags |= MQ_CPU_AVX512_VNNI;
    if (__builtin_cpu_supports("avx512bf16")) flags |= MQ_CPU_AVX512_BF16;
    return flags | detect_amx();
}
#else
static unsigned detect(void) { return 0; }
#endif

static mq_isa best_isa(unsigned flags)
{
    int isa = MQ_ISA_COUNT - 1;
    while (isa > 0 && (flags & isa_needs[isa]) != isa_needs[isa]) isa--;
    return (mq_isa)isa;
}

static void cpu_init(void)
{
    const char *wanted = getenv("MODELQ_ISA");
    cpu.detected = cpu.allowed = detect();
    cpu.isa = best_isa(cpu.detected);
    if (wanted == NULL || *wanted == '\0') return;
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++) {
        if (strcmp(wanted, isa_names[isa]) != 0) continue;
        cpu.allowed &= isa_allows[isa];
        cpu.isa = best_isa(cpu.allowed);
        if (cpu.isa != (mq_isa)isa) cpu.problem = "this processor does not have the ISA that MODELQ_ISA names";
        return;
    }
    cpu.problem = "MODELQ_ISA must be one of c, avx2, avx512";
}

unsigned mq_cpu_features(void)
{
    pthread_once(&cpu_once, cpu_init);
    return cpu.allowed;
}

mq_isa mq_cpu_isa(void)
{
    pthread_once(&cpu_once, cpu_init);
    return cpu.isa;
}

const char *mq_isa_name(mq_isa isa)
{
    return isa_names[isa];
}

int mq_isa_supported(mq_isa isa)
{
    pthread_once(&cpu_once, cpu_init);
    return (cpu.detected & isa_needs[isa]) == isa_needs[isa];
}

const char *mq_cpu_isa_problem(void)
{
    pthread_once(&cpu_once, cpu_init);
    return cpu.problem;
}

size_t mq_cpu_feature_names(char *out, size_t size)
{
    size_t used = 0;
    unsigned flags = mq_cpu_features();
    out[0] = '\0';
    for (size_t i = 0; i < MQ_COUNT(feature_names); i++) {
        if (!(flags & feature_names[i].flag)) continue;
        int n = snprintf(out + used, size - used, "%s%s", used ? " " : "", feature_names[i].name);
        if (n < 0 || (size_t)n >= size - used) break;
        used += (size_t)n;
    }
    return used;
}
