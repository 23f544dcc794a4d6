// Which sources the library was built from: setup.py gives their hash, kernels/cuda.py compares it with that of csrc/.
#include <string>

#include <torch/csrc/stable/library.h>

#define FASTDRAFT_TEXT_(x) #x
#define FASTDRAFT_TEXT(x) FASTDRAFT_TEXT_(x)

namespace {

std::string sources() { return FASTDRAFT_TEXT(FASTDRAFT_SOURCES); }

STABLE_TORCH_LIBRARY_FRAGMENT(fastdraft, m) { m.def("sources() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastdraft, CompositeExplicitAutograd, m) { m.impl("sources", TORCH_BOX(&sources)); }

}  // namespace
