#define PYCOMPRESS_LEVEL portable
#include "vec_portable.h"
//
#include "gram.h"
