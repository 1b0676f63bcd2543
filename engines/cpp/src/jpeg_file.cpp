// JPEG files by libjpeg (libjpeg-turbo).
#include "picture_file.h"

#include "errors.h"

#ifdef HIGEN_JPEG

#include <cstdio>

#include <jpeglib.h>

#include <jerror.h>

#include <csetjmp>
#include <cstring>
#include <utility>

namespace higen::core {
namespace {

// Owned outside the function that libjpeg's longjmp returns to, because that function's own objects are not destroyed.
struct Reading {
    jpeg_error_mgr errors = {};
    std::jmp_buf back = {};
    jpeg_decompress_struct jpeg = {};
    char reason[JMSG_LENGTH_MAX] = "";
    Bytes line;
    Decoded made;
};

extern "C" void fail_jpeg(j_common_ptr jpeg) {
    auto& own = *static_cast<Reading*>(jpeg->client_data);
    jpeg->err->format_message(jpeg, own.reason);
    std::longjmp(own.back, 1);
}

// Without this, libjpeg would fill a truncated file with grey.
extern "C" void warn_jpeg(j_common_ptr jpeg, int level) {
    if (level < 0 && jpeg->err->msg_code == JWRN_JPEG_EOF) fail_jpeg(jpeg);
}

void take_exif(Reading& own) {
    constexpr char head[] = "Exif\0";  // six bytes with the terminating zero
    for (const auto* marker = own.jpeg.marker_list; marker != nullptr; marker = marker->next) {
        const bool is_exif = marker->marker == JPEG_APP0 + 1 && marker->data_length > sizeof head &&
                             std::memcmp(marker->data, head, sizeof head) == 0;
        if (!is_exif) continue;
        own.made.exif.assign(marker->data + sizeof head, marker->data + marker->data_length);
        return;
    }
}

bool read_header(Reading& own, const Bytes& file) {
    if (setjmp(own.back) != 0) return false;
    jpeg_create_decompress(&own.jpeg);
    jpeg_mem_src(&own.jpeg, const_cast<std::uint8_t*>(file.data()), static_cast<unsigned long>(file.size()));
    jpeg_save_markers(&own.jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&own.jpeg, TRUE);
    own.made.width = own.jpeg.image_width;
    own.made.height = own.jpeg.image_height;
    return true;
}

// Converts a line of RGB, or of CMYK as Adobe stores it (0 is full ink), to RGBA.
void convert(const std::uint8_t* line, bool cmyk, std::size_t width, std::uint8_t* to) {
    for (std::size_t x = 0; x < width; ++x, to += 4) {
        for (std::size_t c = 0; c < 3; ++c)
            to[c] = cmyk ? static_cast<std::uint8_t>((line[4 * x + c] * line[4 * x + 3] + 127) / 255) : line[3 * x + c];
        to[3] = 255;
    }
}

bool read_pixels(Reading& own) {
    if (setjmp(own.back) != 0) return false;
    const bool cmyk = own.jpeg.jpeg_color_space == JCS_CMYK || own.jpeg.jpeg_color_space == JCS_YCCK;
    own.jpeg.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&own.jpeg);
    while (own.jpeg.output_scanline < own.jpeg.output_height) {
        JSAMPROW row = own.line.data();
        auto* to = own.made.rgba.data() + 4 * own.made.width * own.jpeg.output_scanline;
        jpeg_read_scanlines(&own.jpeg, &row, 1);
        convert(own.line.data(), cmyk, own.made.width, to);
    }
    jpeg_finish_decompress(&own.jpeg);
    return true;
}

}  // namespace

Decoded decode_jpeg(const Bytes& file, const std::string& path) {
    Reading own;
    own.jpeg.err = jpeg_std_error(&own.errors);
    own.jpeg.client_data = &own;
    own.errors.error_exit = fail_jpeg;
    own.errors.emit_message = warn_jpeg;
    struct Free {
        jpeg_decompress_struct& jpeg;
        ~Free() { jpeg_destroy_decompress(&jpeg); }
    } const free{own.jpeg};
    const auto fail = [&] { fail_request(path + ": cannot be read as a JPEG file: " + own.reason); };
    if (!read_header(own, file)) fail();
    check_picture_size(path, own.made.width, own.made.height);
    take_exif(own);
    own.line.resize(4 * own.made.width);
    own.made.rgba.resize(4 * own.made.width * own.made.height);
    if (!read_pixels(own)) fail();
    return std::move(own.made);
}

}  // namespace higen::core

#endif
