/* modelq._testing: what tests need and users do not: every ISA's kernel table side by side, products, faults. Add a
 * part: write csrc/testing/<name>.c with a `const mq_py_part mq_testing_<name>`, declare it here, list it in
 * testing.c. This extension links its own copy of the core (its own thread pool and dispatch), and
 * py/{convert,ndarray,dlpack,faults,parts}.c. */
#ifndef MQ_TESTING_H
#define MQ_TESTING_H

#include "py/convert.h"
#include "py/ndarray.h"

extern const mq_py_part mq_testing_backward;
extern const mq_py_part mq_testing_gemm;
extern const mq_py_part mq_testing_ops;

#endif
