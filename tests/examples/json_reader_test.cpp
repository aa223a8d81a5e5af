// Reading what JsonLines writes, and refusing everything else.
//   RoundTrips     each type of a field, digit by digit
//   Refuses        a table of malformed and hostile lines: DataError that names the place
//   FieldsByType   missing, of another type, outside limits: errors name the field
//   Files          lines are counted; no file, a folder, a file that is too large
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "examples/common/json_reader.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

TEST(JsonReader, RoundTrips) {
  const std::vector<double> reals = {1.0 / 3, -1e300, 2, 5e-324};
  const std::vector<int64_t> integers = {0, -7, INT64_MAX, INT64_MIN};
  const JsonObject written = {{"text", std::string("a\"b\\ \u00e9\n")},
                              {"integer", int64_t{INT64_MIN}},
                              {"real", .1},
                              {"nothing", std::nan("")},
                              {"reals", reals},
                              {"integers", integers},
                              {"texts", std::vector<std::string>{"", "x"}},
                              {"empty", std::vector<int64_t>{}}};
  const JsonObject read = parse_json(to_json(written), "here");
  ASSERT_EQ(read.size(), written.size());
  for (size_t i = 0; i < read.size(); ++i) {
    EXPECT_EQ(read[i].name, written[i].name);
    if (read[i].name == "nothing") {
      EXPECT_TRUE(std::isnan(std::get<double>(read[i].value)));
    } else {
      EXPECT_EQ(read[i].value, written[i].value) << read[i].name;
    }
  }
}

TEST(JsonReader, Refuses) {
  struct Case {
    std::string text;
    const char* reason;
  };
  const std::string deep(100000, '[');
  for (const Case& c : std::vector<Case>{{"", "no line with a JSON object"},
                                         {"[]", "no line with a JSON object"},
                                         {"3", "no line with a JSON object"},
                                         {"\xef\xbb\xbf{}", "no line with a JSON object"},
                                         {" {}", "no line with a JSON object"},
                                         {"{} ", "no line with a JSON object"},
                                         {std::string("{}\0}", 4), "no line with a JSON object"},
                                         {"{}{}", "parse error"},
                                         {"{\"a\":1,}", "parse error"},
                                         {"{\"a\" 1}", "parse error"},
                                         {"{\"a\":01}", "parse error"},
                                         {"{\"a\":NaN}", "parse error"},
                                         {"{\"a\":1e999}", "overflow"},
                                         {"{\"a\":\"\xff\"}", "parse error"},
                                         {"{\"a\":\"\\ud800\"}", "parse error"},
                                         {"{\"a\":9223372036854775808}", "above 2^63 - 1"},
                                         {"{\"a\":true}", "true and false"},
                                         {"{\"a\":{}}", "an object in an object"},
                                         {"{\"a\":[{}]}", "an object in an object"},
                                         {"{\"a\":[[1]]}", "an array has no place"},
                                         {"{\"a\":" + deep + "}", "an array has no place"},
                                         {"{\"a\":[1,\"b\"]}", "mixes numbers and strings"},
                                         {"{\"a\":[\"b\",1]}", "mixes numbers and strings"},
                                         {"{\"a\":[null,\"b\"]}", "mixes numbers and strings"},
                                         {"{\"a\":1,\"a\":1}", "a name comes twice"},
                                         {"{\"a\":1,\"\\u0061\":1}", "a name comes twice"}}) {
    const std::string text = error_text<DataError>([&] { parse_json(c.text, "runs.jsonl:3"); });
    EXPECT_NE(text.find("runs.jsonl:3"), std::string::npos) << text;
    EXPECT_NE(text.find(c.reason), std::string::npos) << text << " for " << c.text.substr(0, 40);
  }
}

TEST(JsonReader, FieldsByType) {
  const JsonObject object = parse_json(
      "{\"gate\":\"comet\",\"seed\":3,\"real\":1.5,\"names\":[\"a\"],\"counts\":[1,2],"
      "\"below\":[-1]}",
      "f:1");
  const JsonFields fields(object, "f:1");
  EXPECT_EQ(fields.text("gate"), "comet");
  EXPECT_EQ(fields.integer("seed", 3, 3), 3);
  EXPECT_EQ(fields.texts("names"), std::vector<std::string>{"a"});
  EXPECT_EQ(fields.counts("counts", 2, 2), (std::vector<int64_t>{1, 2}));
  const auto expect_refused = [](auto body, const char* words) {
    const std::string text = error_text<DataError>(body);
    EXPECT_NE(text.find("f:1"), std::string::npos) << text;
    EXPECT_NE(text.find(words), std::string::npos) << text;
  };
  expect_refused([&] { fields.text("none"); }, "\"none\" is missing");
  expect_refused([&] { fields.text("seed"); }, "\"seed\" is not a string");
  expect_refused([&] { fields.integer("real", 0, 9); }, "\"real\" is not a whole number");
  expect_refused([&] { fields.integer("seed", 4, 9); }, "\"seed\" is 3, outside 4 to 9");
  expect_refused([&] { fields.integer("seed", 0, 2); }, "\"seed\" is 3, outside 0 to 2");
  expect_refused([&] { fields.texts("counts"); }, "\"counts\" is not an array of strings");
  expect_refused([&] { fields.counts("names", 1, 9); }, "\"names\" is not an array of whole");
  expect_refused([&] { fields.counts("counts", 3, 9); }, "has 2 numbers where 3 belong");
  expect_refused([&] { fields.counts("counts", 2, 1); }, "has 2, outside 0 to 1");
  expect_refused([&] { fields.counts("below", 1, 9); }, "has -1, outside 0 to 9");
}

TEST(JsonReader, Files) {
  const std::string path = ::testing::TempDir() + "perseid_reader.jsonl";
  const auto write = [&](const std::string& text) { std::ofstream(path) << text; };
  write("{\"a\":1}\n{\"a\":2}\n");
  EXPECT_EQ(read_json_lines(path).size(), size_t{2});
  write("");
  EXPECT_TRUE(read_json_lines(path).empty());
  write("{\"a\":1}\n\n");
  std::string text = error_text<DataError>([&] { read_json_lines(path); });
  EXPECT_NE(text.find(path + ":2"), std::string::npos) << text;
  std::filesystem::resize_file(path, (uintmax_t{16} << 20) + 1);
  text = error_text<DataError>([&] { read_json_lines(path); });
  EXPECT_NE(text.find("above 16 MiB"), std::string::npos) << text;
  for (const std::string& wrong : {std::string("/no/such/file"), ::testing::TempDir()}) {
    text = error_text<IoError>([&] { read_json_lines(wrong); });
    EXPECT_NE(text.find(wrong), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace perseid::examples
