/* The parts of a quantized matrix, {'weight', 'weight_scale', 'weight_scale_2'}, as views. */
#ifndef MQ_PY_PARTS_H
#define MQ_PY_PARTS_H

#include "py/state.h"

#include "quant/block.h"

/* block_size: None, NULL or 0 is the scheme's own. These return 0, or -1 with an exception set. */
int mq_parse_scheme(const char *name, PyObject *block_size, mq_block_job *job);
int mq_parse_float_dtype(const char *name, mq_dtype *out);

/* Fills in parts and shape of a weight whose job is known. *keep receives a new reference that must live as long. */
int mq_view_parts(mq_state *state, PyObject *dict, mq_stored_weight *weight, PyObject **keep);
/* The same of numbers that are yet to be quantized; scaling: (amax, block_amax, second_divisor), each as `quantize`
 * takes it. */
int mq_view_numbers(mq_state *state, PyObject *array, PyObject *scaling, mq_stored_weight *weight, PyObject **keep);

#endif
