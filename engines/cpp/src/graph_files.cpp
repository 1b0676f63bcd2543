#include "graph_files.h"

#include <cstdint>
#include <utility>

#include "errors.h"

namespace higen::core {
namespace {

// A field of a protobuf message: its number, and its content where it has a length.
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
    [[noreturn]] void fail() const { fail_integrity(where_ + ": is no ONNX graph"); }

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

constexpr int deepest = 64;  // graphs within graphs

// Calls `visit` with the content of each field of these numbers.
template <typename Visit>
void each(std::string_view bytes, const std::string& where, const Visit& visit) {
    Message message(bytes, where);
    for (Field field; message.next(field);)
        if (field.has_content) visit(field.number, field.content);
}

class Finder {
public:
    explicit Finder(const std::string& where) : where_(where) {}

    // ModelProto: graph = 7, training_info = 20, functions = 25.
    void model(std::string_view bytes) {
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number == 7) graph(content, 0);
            if (number == 20) training(content);
            if (number == 25) function(content);
        });
    }

    std::set<std::string> found;

private:
    // TrainingInfoProto: initialization = 1, algorithm = 2.
    void training(std::string_view bytes) {
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number == 1 || number == 2) graph(content, 0);
        });
    }

    // GraphProto: node = 1, initializer = 5, sparse_initializer = 15.
    void graph(std::string_view bytes, int depth) {
        if (depth > deepest) fail_integrity(where_ + ": graphs within graphs, too deep");
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number == 1) node(content, depth);
            if (number == 5) tensor(content);
            if (number == 15) sparse(content);
        });
    }

    // FunctionProto: node = 7.
    void function(std::string_view bytes) {
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number == 7) node(content, 0);
        });
    }

    // NodeProto: attribute = 5.
    void node(std::string_view bytes, int depth) {
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number == 5) attribute(content, depth);
        });
    }

    // AttributeProto: t = 5, g = 6, tensors = 10, graphs = 11, sparse_tensor = 22, sparse_tensors = 23.
    void attribute(std::string_view bytes, int depth) {
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number == 5 || number == 10) tensor(content);
            if (number == 6 || number == 11) graph(content, depth + 1);
            if (number == 22 || number == 23) sparse(content);
        });
    }

    // SparseTensorProto: values = 1, indices = 2.
    void sparse(std::string_view bytes) {
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number == 1 || number == 2) tensor(content);
        });
    }

    // TensorProto: external_data = 13, pairs of key = 1 and value = 2.
    void tensor(std::string_view bytes) {
        each(bytes, where_, [&](std::uint64_t number, std::string_view content) {
            if (number != 13) return;
            std::string_view key, value;
            each(content, where_, [&](std::uint64_t part, std::string_view text) {
                if (part == 1) key = text;
                if (part == 2) value = text;
            });
            if (key == "location") found.emplace(value);
        });
    }

    const std::string& where_;
};

}  // namespace

std::set<std::string> external_files(std::string_view onnx, const std::string& where) {
    Finder finder(where);
    finder.model(onnx);
    return std::move(finder.found);
}

}  // namespace higen::core
