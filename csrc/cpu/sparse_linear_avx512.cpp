#define PYCOMPRESS_LEVEL avx512
#include "vec_avx512.h"
//
#include "sparse_linear.h"
