/* Block maxima, for other launchers. */
#ifndef MODELQ_AMAX_CUH
#define MODELQ_AMAX_CUH

#include "convert.cuh"

/* out [blocks->rows, blocks->cols] */
int mq_cuda_amax_blocks(const mq_cuda_matrix *x, const mq_blocks *blocks, float *out, void *stream, mq_error *err);

#endif
