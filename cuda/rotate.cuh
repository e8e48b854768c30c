/* Hadamard rotation of blocks of columns, in the order of csrc/quant/prepare.c, so with its bits: by the thread within
 * its group, by exchange within the warp, and through shared memory beyond. */
#ifndef MODELQ_ROTATE_CUH
#define MODELQ_ROTATE_CUH

#include "rows.cuh"

enum { MQ_ROTATE_MOST = 1024, MQ_ROTATE_SHARED = 2 * MQ_THREADS * MQ_GROUP };

/* Columns that are rotated together: a power of two; 0: none. */
typedef struct mq_rotation {
    int64_t size;
    float norm;                 /* 1 / sqrt(size) */
} mq_rotation;

/* x: the thread's groups, which follow each other from thread to thread of the block, so that it holds whole blocks of
 * columns. exchange: MQ_ROTATE_SHARED floats of shared memory that no other call uses. The whole thread block calls. */
MQ_DEVICE void mq_rotate(const mq_rotation &rotation, float *x, float *exchange)
{
    const int thread = (int)threadIdx.x, size = (int)rotation.size;
    for (int half = 1; half < MQ_GROUP; half *= 2) {
        if (half >= size) break;
        for (int i = 0; i < MQ_GROUP; i++) {
            const float a = x[i], b = x[i ^ half];
            if ((i & half) != 0) continue;
            x[i] = a + b;
            x[i ^ half] = a - b;
        }
    }
    for (int half = MQ_GROUP; half < size; half *= 2) {
        const int distance = half / MQ_GROUP;
        float *const own = exchange + (half == 2 * MQ_WARP * MQ_GROUP ? MQ_THREADS * MQ_GROUP : 0);
        float other[MQ_GROUP];
        if (distance < MQ_WARP) {
            for (int i = 0; i < MQ_GROUP; i++) other[i] = mq_exchange(x[i], distance);
        } else {
            for (int i = 0; i < MQ_GROUP; i++) own[i * MQ_THREADS + thread] = x[i];
            __syncthreads();
            for (int i = 0; i < MQ_GROUP; i++) other[i] = own[i * MQ_THREADS + (thread ^ distance)];
        }
        for (int i = 0; i < MQ_GROUP; i++) x[i] = (thread & distance) != 0 ? other[i] - x[i] : x[i] + other[i];
    }
    for (int i = 0; size != 0 && i < MQ_GROUP; i++) x[i] *= rotation.norm;
}

/* ---- host ---- */

/* Of columns [cols]; MQ_ERR_VALUE if they are not whole blocks. */
int mq_cuda_rotation(int64_t size, int64_t cols, mq_rotation *rotation, mq_error *err);

#endif
