// A test harness in one header: TEST registers a named function, the CHECK macros report file, line and
// values and let the test go on. main.cpp runs the tests.
#pragma once

#include <cmath>
#include <exception>
#include <sstream>
#include <string>
#include <typeinfo>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
std::vector<Test>& tests();
void fail(const char* file, int line, const std::string& what);
// Said once in the output, beside the failures of one test: which of many cases it is at.
void at(const std::string& where);

struct Registered {
  Registered(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

template <class A, class B>
std::string both(const A& a, const B& b) {
  std::ostringstream text;
  text.precision(9);
  text << " (" << a << " and " << b << ")";
  return text.str();
}

}  // namespace check

// Named "group: behaviour", e.g. TEST(threads, "a parked worker wakes up").
#define TEST(group, name) TEST_AT(group, name, __LINE__)
#define TEST_AT(group, name, line) TEST_AT_(group, name, line)
#define TEST_AT_(group, name, line)                                                        \
  static void test_at_line_##line();                                                       \
  static const check::Registered registered_##line(#group ": " name, test_at_line_##line); \
  static void test_at_line_##line()

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) check::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (0)
#define CHECK_EQ(a, b)                                                                              \
  do {                                                                                              \
    const auto check_a = (a);                                                                       \
    const auto check_b = (b);                                                                       \
    if (!(check_a == check_b))                                                                      \
      check::fail(__FILE__, __LINE__, "not equal: " #a " and " #b + check::both(check_a, check_b)); \
  } while (0)
#define CHECK_NEAR(a, b, tolerance)                                                                \
  do {                                                                                             \
    const double check_a = (a), check_b = (b);                                                     \
    if (!(std::fabs(check_a - check_b) <= (tolerance)))                                            \
      check::fail(__FILE__, __LINE__, "not near: " #a " and " #b + check::both(check_a, check_b)); \
  } while (0)
// The expression must throw exactly this type, with `part` in its message.
#define CHECK_THROWS(type, part, expression)                                                             \
  do {                                                                                                   \
    std::string check_got = "nothing";                                                                   \
    try {                                                                                                \
      expression;                                                                                        \
    } catch (const std::exception& error) {                                                              \
      check_got =                                                                                        \
          typeid(error) == typeid(type) ? error.what() : std::string("another type: ") + error.what();   \
      if (typeid(error) == typeid(type) && check_got.find(part) != std::string::npos) check_got.clear(); \
    }                                                                                                    \
    if (!check_got.empty())                                                                              \
      check::fail(__FILE__, __LINE__,                                                                    \
                  "must throw " #type " with '" + std::string(part) + "', threw: " + check_got);         \
  } while (0)
