// Tests without a model: names of providers, settings of sessions, files of graphs, orientation of pictures.
#include <fstream>

#include "check.h"
#include "graph_files.h"
#include "onnx_providers.h"
#include "picture_file.h"

using namespace higen::core;

namespace {

std::string field(int number, const std::string& content) {
    return std::string(1, static_cast<char>(number << 3 | 2)) + static_cast<char>(content.size()) + content;
}

// A field with a number above 15 has a tag of two bytes.
std::string tall_field(int number, const std::string& content) {
    return std::string{static_cast<char>((((number << 3 | 2) & 127) | 128)), static_cast<char>(number >> 4)} +
           static_cast<char>(content.size()) + content;
}

std::string tensor(const std::string& file) { return field(13, field(1, "location") + field(2, file)); }

}  // namespace

TEST(a_provider_is_read_whole_or_refused) {
    CHECK(parse_provider("cpu:0").kind == "CPUExecutionProvider" && !parse_provider("cpu").is_gpu());
    CHECK(parse_provider("cuda").device == 0 && parse_provider("cuda").kind == "CUDAExecutionProvider");
    CHECK(parse_provider("cuda:0").device == 0 && parse_provider("cuda:12").device == 12);
    CHECK(parse_provider("tensorrt-rtx:1").device == 1 && parse_provider("tensorrt-rtx:1").name == "tensorrt-rtx:1");
    for (const char* wrong : {"", "cuda:", "cuda:banana", "cuda:-1", "cuda:+1", "cuda:1x", "cuda:01", "cuda: 1", "cuda:1:2",
                              "cuda:99999999999", "cpu:7", "cpu:1", "CUDA", "cuda1", ":1", "auto", "auto:0"})
        CHECK_FAILS(HIGEN_ERROR_REQUEST, "provider='" + std::string(wrong) + "': one of 'auto', 'cpu'", parse_provider(wrong));
}

TEST(every_session_multiplies_int8_exactly) {
    for (const int threads : {0, 2})
        CHECK(session_settings(threads).GetConfigEntryOrDefault("session.x64quantprecision", "0") == "1");
}

TEST(want_of_memory_is_told_from_a_broken_file) {
    CHECK(is_out_of_memory("std::bad_alloc") && is_out_of_memory("Failed to allocate memory for requested buffer of size 8"));
    CHECK(!is_out_of_memory("Protobuf parsing failed."));
}

TEST(the_files_of_a_graph) {
    const auto initializer = field(7, field(5, tensor("a.bin")));
    CHECK(external_files(initializer, "g") == std::set<std::string>{"a.bin"});
    // Constants in a node, within a branch, in a function, and one sparse.
    const auto node = field(1, field(5, field(5, tensor("b.bin")))), branch = field(1, field(5, field(6, field(5, tensor("c.bin")))));
    const auto model = field(7, node + branch + field(15, field(1, tensor("e.bin")))) +
                       tall_field(25, field(7, field(5, field(5, tensor("d.bin")))));
    CHECK((external_files(model, "g") == std::set<std::string>{"b.bin", "c.bin", "d.bin", "e.bin"}));
    CHECK(external_files("", "g").empty());
    for (std::size_t cut = 1; cut < initializer.size(); ++cut)
        CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "g: is not an ONNX graph", external_files(initializer.substr(0, cut), "g"));
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "is not an ONNX graph", external_files(std::string(40, '\xff'), "g"));
}

TEST(orientations) {
    const auto exif = [](bool little, int value) {
        Bytes tiff = little ? Bytes{'I', 'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, 0, 0, 0, 0}
                            : Bytes{'M', 'M', 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0};
        tiff[little ? 18 : 19] = static_cast<std::uint8_t>(value);
        return tiff;
    };
    for (const bool little : {true, false}) {
        for (int way = 1; way <= 8; ++way) CHECK(orientation_of(exif(little, way)) == way);
        CHECK(orientation_of(exif(little, 0)) == 1 && orientation_of(exif(little, 9)) == 1);
        const auto whole = exif(little, 6);
        for (std::size_t cut = 0; cut < whole.size(); ++cut)
            CHECK(orientation_of(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(cut))) == 1);
    }
    CHECK(orientation_of(Bytes(64, 0xff)) == 1);
}

int main() { return test::run_all(); }
