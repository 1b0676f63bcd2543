// The part of the C interface that reads pictures.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "c_api.h"
#include "picture_file.h"

using namespace higen::c_api;

higen_status higen_image_open(const char* path, higen_image* image) {
    return guarded([&] {
        require(path, "path");
        require(image, "image");
        const auto read = higen::core::read_picture(path);
        higen_image found = HIGEN_IMAGE_INIT;
        found.height = narrow(read.height);
        found.width = narrow(read.width);
        std::unique_ptr<std::uint8_t, void (*)(void*)> rgb(
            static_cast<std::uint8_t*>(std::malloc(read.pixels.size())), std::free);
        if (!rgb) throw std::bad_alloc();
        std::memcpy(rgb.get(), read.pixels.data(), read.pixels.size());
        found.rgb = rgb.get();
        store(found, image, "image");
        (void)rgb.release();
    });
}

void higen_image_free(higen_image* image) {
    if (image == nullptr) return;
    std::free(image->rgb);
    image->rgb = nullptr;
}
