// Chooses the instruction-set level at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pycompress {

std::vector<std::string> levels_built();
std::vector<std::string> levels_available();  // built, and this processor runs them
std::string level_in_use();
// Throws std::invalid_argument, naming what is allowed, for an unknown level or one this processor cannot run.
void use_level(const std::string &name);
const Kernels &kernels();

}  // namespace pycompress
