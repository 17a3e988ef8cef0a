#define PYCOMPRESS_LEVEL portable
#include "vec_portable.h"
//
#include "subnet_linear.h"
