#include "graph_files.h"

#include <array>
#include <cstdint>

#include "errors.h"

namespace higen::core {
namespace {

// A field of a protobuf message: its number, and its content if it is length-delimited.
struct Field {
    std::uint64_t number = 0;
    bool has_content = false;
    std::string_view content;
};

// Reads the fields of a message one by one (protobuf.dev/programming-guides/encoding).
class Message {
public:
    Message(std::string_view bytes, const std::string& where) : bytes_(bytes), where_(where) {}

    [[nodiscard]] bool next(Field& field) {
        if (bytes_.empty()) return false;
        const auto key = varint();
        field = {key >> 3, false, {}};
        switch (key & 7) {
            case 0: (void)varint(); break;
            case 1: (void)take(8); break;
            case 2: field.has_content = true, field.content = take(varint()); break;
            case 5: (void)take(4); break;
            default: fail();
        }
        return true;
    }

private:
    [[noreturn]] void fail() const { fail_integrity(where_ + ": is not an ONNX graph"); }

    std::uint64_t varint() {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            const auto byte = static_cast<unsigned char>(take(1)[0]);
            value |= std::uint64_t{byte & 127U} << shift;
            if (byte < 128) return value;
        }
        fail();
    }

    std::string_view take(std::uint64_t size) {
        if (size > bytes_.size()) fail();
        const auto content = bytes_.substr(0, static_cast<std::size_t>(size));
        bytes_.remove_prefix(static_cast<std::size_t>(size));
        return content;
    }

    std::string_view bytes_;
    const std::string& where_;
};

constexpr int deepest = 64;  // nesting of graphs

// Calls `visit` with the number and content of each field that has content.
template <typename Visit>
void each(std::string_view bytes, const std::string& where, const Visit& visit) {
    Message message(bytes, where);
    for (Field field; message.next(field);)
        if (field.has_content) visit(field.number, field.content);
}

enum class Kind { model, training, graph, function, node, attribute, sparse, tensor };

// A field of onnx.proto that leads to tensors: the message that has it, its number, and its own message type.
struct Way {
    Kind of;
    std::uint64_t number;
    Kind to;
};

constexpr std::array<Way, 18> ways = {{
    {Kind::model, 7, Kind::graph},       {Kind::model, 20, Kind::training},   {Kind::model, 25, Kind::function},
    {Kind::training, 1, Kind::graph},    {Kind::training, 2, Kind::graph},    {Kind::graph, 1, Kind::node},
    {Kind::graph, 5, Kind::tensor},      {Kind::graph, 15, Kind::sparse},     {Kind::function, 7, Kind::node},
    {Kind::node, 5, Kind::attribute},    {Kind::attribute, 5, Kind::tensor},  {Kind::attribute, 10, Kind::tensor},
    {Kind::attribute, 6, Kind::graph},   {Kind::attribute, 11, Kind::graph},  {Kind::attribute, 22, Kind::sparse},
    {Kind::attribute, 23, Kind::sparse}, {Kind::sparse, 1, Kind::tensor},     {Kind::sparse, 2, Kind::tensor},
}};

// An entry of TensorProto.external_data: key = 1, value = 2.
void take_location(std::string_view entry, const std::string& where, std::set<std::string>& found) {
    std::string_view key, value;
    each(entry, where, [&](std::uint64_t number, std::string_view text) {
        if (number == 1) key = text;
        if (number == 2) value = text;
    });
    if (key == "location") found.emplace(value);
}

void find(Kind kind, std::string_view bytes, int depth, const std::string& where, std::set<std::string>& found) {
    if (depth > deepest) fail_integrity(where + ": its graphs are nested too deeply");
    each(bytes, where, [&](std::uint64_t number, std::string_view content) {
        if (kind == Kind::tensor && number == 13) take_location(content, where, found);
        for (const auto& way : ways) {
            if (way.of != kind || way.number != number) continue;
            const bool deeper = kind == Kind::attribute && way.to == Kind::graph;
            find(way.to, content, depth + (deeper ? 1 : 0), where, found);
        }
    });
}

}  // namespace

std::set<std::string> external_files(std::string_view onnx, const std::string& where) {
    std::set<std::string> found;
    find(Kind::model, onnx, 0, where, found);
    return found;
}

}  // namespace higen::core
