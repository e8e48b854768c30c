/* Arrays that an operation reads or writes in place. */
#ifndef MQ_TESTING_OPERANDS_H
#define MQ_TESTING_OPERANDS_H

#include "testing/testing.h"

#include "model/ops.h"

enum { MQ_MOST_OPERANDS = 11 };

typedef struct mq_operands {
    mq_tensor view[MQ_MOST_OPERANDS];
    PyObject *keep[MQ_MOST_OPERANDS];
    int count;
} mq_operands;

/* 0, or -1 with an exception set: they must be contiguous. Released in both cases by mq_operands_release. */
int mq_operands_take(mq_operands *set, mq_state *state, PyObject *object);
int mq_operands_take_all(mq_operands *set, mq_state *state, PyObject *tuple);
void mq_operands_release(mq_operands *set);

/* Rows of x: its first axis, and all others together. */
mq_row_sizes mq_rows_of(const mq_tensor *x);

#endif
