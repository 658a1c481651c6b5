# For a Python without pybind11 and without a network: its headers, as they come with torch. torch is not imported, and
# its own headers are not used. Defines pybind11_add_module(<target> MODULE NO_EXTRAS <source>...), as far as it is
# called here.
execute_process(COMMAND ${Python_EXECUTABLE} -c "import importlib.util; s = importlib.util.find_spec('torch'); \
print(s.submodule_search_locations[0] if s else '')" OUTPUT_VARIABLE torch_folder OUTPUT_STRIP_TRAILING_WHITESPACE)
set(bundled ${torch_folder}/include)
set(version 0)
if(torch_folder AND EXISTS ${bundled}/pybind11/pybind11.h)
  file(STRINGS ${bundled}/pybind11/detail/common.h lines REGEX "#define PYBIND11_VERSION_(MAJOR|MINOR) ")
  string(REGEX REPLACE "[^0-9;]*PYBIND11_VERSION_(MAJOR|MINOR) +" "" numbers "${lines}")
  list(TRANSFORM numbers STRIP)
  string(REPLACE ";" "." version "${numbers}")
endif()
if(version VERSION_LESS 2.13)
  message(FATAL_ERROR "pybind11 2.13 or newer was not found, neither installed for ${Python_EXECUTABLE} nor beside its "
                      "torch: pip install pybind11")
endif()
message(STATUS "fastsep: pybind11 ${version} of torch, ${bundled}")

# The headers alone: in a folder of their own, so that nothing else of torch's can be included.
set(pybind11_headers ${CMAKE_BINARY_DIR}/pybind11-of-torch)
file(MAKE_DIRECTORY ${pybind11_headers})
file(CREATE_LINK ${bundled}/pybind11 ${pybind11_headers}/pybind11 SYMBOLIC)

function(pybind11_add_module target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "MODULE;NO_EXTRAS" "" "")
  Python_add_library(${target} MODULE WITH_SOABI ${arg_UNPARSED_ARGUMENTS})
  target_include_directories(${target} SYSTEM PRIVATE ${pybind11_headers})
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden)
endfunction()
