#pragma once
#include <gtest/gtest.h>

#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "kernels/error.h"

namespace perseid::testing {

/// One row of a table of wrong inputs: a call, and the four pieces of the error it must throw.
/// `limit` is any part of the rest of the sentence.
struct Refused {
  std::function<void()> call;
  std::string operation;
  std::string argument;
  std::string value;
  std::string limit;
};

/// Fails unless the call throws an error of ours whose fields are those of the row and whose text
/// holds them.
template <typename Expected = ConfigError>
void expect_refused(const Refused& row) {
  const std::string expected =
      "[" + row.operation + "] " + row.argument + "=" + row.value + " ... " + row.limit;
  try {
    row.call();
    ADD_FAILURE() << "no error, expected: " << expected;
  } catch (const Expected& error) {
    const ErrorDetail& detail = error.detail();
    EXPECT_EQ(detail.operation, row.operation) << error.what();
    EXPECT_EQ(detail.argument, row.argument) << error.what();
    EXPECT_EQ(detail.value, row.value) << error.what();
    EXPECT_FALSE(row.limit.empty()) << error.what();
    EXPECT_NE(detail.limit.find(row.limit), std::string::npos)
        << "got:      " << error.what() << "\nexpected: " << expected;
    const std::string text = "[" + row.operation + "] " + row.argument + "=" + row.value;
    EXPECT_EQ(std::string(error.what()).rfind(text, 0), 0u) << error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another kind of error: " << error.what() << "\nexpected: " << expected;
  }
}

template <typename Expected = ConfigError>
void expect_refused(const std::vector<Refused>& rows) {
  for (const Refused& row : rows) expect_refused<Expected>(row);
}

}  // namespace perseid::testing
