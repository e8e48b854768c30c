/* The kernels for the baseline of the compiler's target. */
#define MQ_KERNELS_ISA MQ_ISA_C
#include "kernels/kernels.inc"

const mq_kernels mq_kernels_c = {
    MQ_KERNELS_GENERIC,
#include "kernels/kernels_lists.inc"
};
