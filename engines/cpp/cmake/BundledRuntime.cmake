# Installs ONNX Runtime's library beside higen's library. The package then needs no other folder and can be moved.

get_filename_component(onnxruntime_file "${ONNXRuntime_LIBRARY}" REALPATH)
get_filename_component(onnxruntime_folder "${onnxruntime_file}" DIRECTORY)

# The loader finds system libraries without help.
set(bundle_onnxruntime ON)
foreach(folder ${CMAKE_CXX_IMPLICIT_LINK_DIRECTORIES})
    get_filename_component(folder "${folder}" REALPATH)
    if(folder STREQUAL onnxruntime_folder)
        set(bundle_onnxruntime OFF)
    endif()
endforeach()
option(HIGEN_INSTALL_ONNXRUNTIME "Install ONNX Runtime's library beside higen's" ${bundle_onnxruntime})

# Folders outside the installed package in which its programs look for libraries.
set(installed_rpath "")
if(NOT HIGEN_INSTALL_ONNXRUNTIME AND bundle_onnxruntime)
    list(APPEND installed_rpath "${onnxruntime_folder}")
endif()
if(HIGEN_TENSORRT)
    get_filename_component(tensorrt_folder "${TensorRT_LIBRARY}" DIRECTORY)
    list(APPEND installed_rpath "${tensorrt_folder}")
endif()

# Where an installed static library finds dependencies outside the package.
set(installed_onnxruntime_root "")
set(installed_tensorrt_root "")
if(NOT BUILD_SHARED_LIBS AND NOT HIGEN_INSTALL_ONNXRUNTIME)
    set(installed_onnxruntime_root "${ONNXRUNTIME_ROOT}")
endif()
if(NOT BUILD_SHARED_LIBS)
    set(installed_tensorrt_root "${TENSORRT_ROOT}")
endif()

# Installs the library under the name that the loader asks for, and the providers that it loads from its own folder.
function(higen_install_onnxruntime)
    get_filename_component(name "${onnxruntime_file}" NAME)
    if(CMAKE_READELF)
        execute_process(COMMAND "${CMAKE_READELF}" -d "${onnxruntime_file}" OUTPUT_VARIABLE dynamic ERROR_QUIET)
        if(dynamic MATCHES "SONAME[^\n]*\\[([^]\n]+)\\]")
            set(name "${CMAKE_MATCH_1}")
        endif()
    endif()
    install(PROGRAMS "${onnxruntime_file}" DESTINATION ${CMAKE_INSTALL_LIBDIR} RENAME "${name}")
    if(NOT BUILD_SHARED_LIBS)  # programs that link the static library link this one too, by its plain name
        file(CREATE_LINK "${name}" "${CMAKE_CURRENT_BINARY_DIR}/libonnxruntime.so" SYMBOLIC)
        install(FILES "${CMAKE_CURRENT_BINARY_DIR}/libonnxruntime.so" DESTINATION ${CMAKE_INSTALL_LIBDIR})
    endif()
    file(GLOB providers "${onnxruntime_folder}/libonnxruntime_providers_*.so")
    if(providers)
        install(PROGRAMS ${providers} DESTINATION ${CMAKE_INSTALL_LIBDIR})
    endif()
endfunction()
