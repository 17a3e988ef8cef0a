#define PYCOMPRESS_LEVEL avx2
#include "vec_avx2.h"
//
#include "sparse_linear.h"
